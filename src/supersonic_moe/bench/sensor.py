"""SM clock and board power of one GPU, by NVML: without them nobody can judge a TFLOP/s figure of a power-capped chip.

Needs the package nvidia-ml-py (it comes with most CUDA builds of torch); without it a benchmark runs and leaves these
columns empty.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Reading(NamedTuple):
    sm_mhz: float
    watts: float


def open_nvml(device: torch.device) -> tuple[ModuleType, Any] | None:
    """(module, handle of the GPU), or None. By UUID, because CUDA_VISIBLE_DEVICES may reorder or hide devices."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        nvml.nvmlInit()
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except nvml.NVMLError:
        return None


class Sensor:
    def __init__(self, nvml: ModuleType, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, device: torch.device) -> Sensor | None:
        """None without NVML."""
        found = open_nvml(device)
        return None if found is None else cls(*found)

    def read(self) -> Reading:
        mhz = self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        return Reading(float(mhz), self._milliwatts() / 1000)

    def _milliwatts(self) -> float:
        """Power now; nvmlDeviceGetPowerUsage averages over the last second, which mixes neighbouring contenders."""
        field = self._nvml.nvmlDeviceGetFieldValues(self._handle, [self._nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if field.nvmlReturn == self._nvml.NVML_SUCCESS:
            return float(field.value.uiVal)
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle))
