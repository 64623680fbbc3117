"""The checks behind ``supersonic-moe doctor``: what this machine has, whether it works, and how to fix what does not.

A check fails only where the package is unusable; whatever merely costs speed is a warning. A machine without a GPU is
fine: the reference backend runs there, and NVRTC compiles kernels for GPUs elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from supersonic_moe import LOG_LEVELS
from supersonic_moe.bench.options import why_not_writable

CUDA_EXTRA = 'pip install "supersonic-moe[cuda13]"'
REPORT = "please report this with the output of `supersonic-moe doctor --json`"
MIN_TORCH = (2, 10)
ONLY_GPUS = "layers on this machine do without, kernels for GPUs (`warmup`) cannot be compiled"
LAUNCH_BUDGET_US = 8.0  # host time of one kernel launch; above it small layers are launch-bound


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def run_checks(checks: Sequence[Callable[[], Check]], progress: Callable[[str], None]) -> list[Check]:
    """Run every check; one that breaks in an unforeseen way is a failure with its own message, not a traceback."""
    results = []
    for check in checks:
        name = check.__name__.replace("_", " ")
        progress(name)
        try:
            results.append(check())
        except Exception as error:  # a doctor who dies during the examination helps nobody
            results.append(Check(name, "fail", f"the check broke: {type(error).__name__}: {error}", REPORT))
    return results


def all_checks() -> list[Callable[[], Check]]:
    """The checks that apply here, in the order they are shown."""
    checks: list[Callable[[], Check]] = [python, pytorch, gpu]
    if gpus():
        checks.append(driver)
    checks += [environment, triton, nvrtc, cuda_bindings, symmetric_memory]
    if len(gpus()) > 1:
        checks.append(peer_access)
    checks += [compiled_kernels, kernel_cache, self_test]
    if hopper():
        checks.append(launch_overhead)
    return checks


def gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def hopper() -> list[int]:
    """The GPUs that run the sm_90a kernels."""
    return [i for i in gpus() if torch.cuda.get_device_capability(i) == (9, 0)]


# ---- software and devices ------------------------------------------------------------------------------------------


def python() -> Check:
    return Check("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def pytorch() -> Check:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    found = f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    if version < MIN_TORCH:
        need = ".".join(map(str, MIN_TORCH))
        return Check("pytorch", "fail", found, f'torch >= {need} is required: pip install "torch>={need}"')
    return Check("pytorch", "ok", found)


def gpu() -> Check:
    if not gpus():
        return Check("gpu", "warn", "none that torch can use: layers run on the CPU reference backend", _why_no_gpu())
    names, too_old = [], False
    for i in gpus():
        properties = torch.cuda.get_device_properties(i)
        sm = f"sm_{properties.major}{properties.minor}"
        memory = properties.total_memory / 2**30
        names.append(f"cuda:{i} {properties.name}, {sm}, {properties.multi_processor_count} SMs, {memory:.0f} GiB")
        too_old |= properties.major < 8
    if too_old:
        return Check(
            "gpu", "warn", "\n".join(names), "bf16 grouped products need sm_80 or newer; older GPUs run the reference"
        )
    if not hopper():
        return Check(
            "gpu", "warn", "\n".join(names), "the sm_90a kernels need Hopper; this GPU runs the Triton backend"
        )
    return Check("gpu", "ok", "\n".join(names))


def _gpu_present() -> bool:
    return Path("/dev/nvidia0").exists() or _nvidia_smi("name") is not None


def _why_no_gpu() -> str:
    if not _gpu_present():
        return "nothing to fix unless this machine has an NVIDIA GPU"
    if torch.version.cuda is None:
        return "this torch is a CPU build: pip install torch --index-url https://download.pytorch.org/whl/cu130"
    return f"the driver does not serve CUDA {torch.version.cuda}: update it, and check CUDA_VISIBLE_DEVICES"


def driver() -> Check:
    version = _nvidia_smi("driver_version")
    if version is None:
        return Check(
            "driver", "warn", "unknown: nvidia-smi does not answer", "put nvidia-smi on PATH to see the version"
        )
    return Check("driver", "ok", f"{version[0]}, torch uses CUDA {torch.version.cuda}")


def _nvidia_smi(field: str) -> list[str] | None:
    """One value per GPU, or None where there is no working nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return [line.strip() for line in answer.splitlines() if line.strip()] or None


def environment() -> Check:
    """The three variables of this package, as they are set."""
    from supersonic_moe.jit import JitError, policy

    values = {
        "SUPERSONIC_MOE_CACHE_DIR": os.environ.get("SUPERSONIC_MOE_CACHE_DIR"),
        "SUPERSONIC_MOE_LOG_LEVEL": os.environ.get("SUPERSONIC_MOE_LOG_LEVEL"),
        "SUPERSONIC_MOE_JIT_POLICY": os.environ.get("SUPERSONIC_MOE_JIT_POLICY"),
    }
    found = "\n".join(f"{name}={value}" for name, value in values.items() if value) or "no variable is set"
    if (level := values["SUPERSONIC_MOE_LOG_LEVEL"]) and level.upper() not in logging.getLevelNamesMapping():
        fix = f"unset SUPERSONIC_MOE_LOG_LEVEL, or choose one of {LOG_LEVELS}"
        return Check("environment", "warn", found, fix)
    try:
        policy()
    except JitError as error:  # it stops every first use of a kernel
        return Check("environment", "fail" if gpus() else "warn", found, f"{error}. Change or unset it")
    return Check("environment", "ok", found)


def compiling_obstacle() -> str | None:
    """What keeps kernels from being compiled, with or without a GPU here; a sentence."""
    missing = next((check.name for check in (triton(), nvrtc()) if check.status != "ok"), None)
    return missing and f"Kernels cannot be compiled without {missing}: {CUDA_EXTRA}"


def triton() -> Check:
    if importlib.util.find_spec("triton") is not None:
        return Check("triton", "ok", importlib.metadata.version("triton"))
    if gpus():
        return Check("triton", "fail", "not installed", f"routing and memory-bound kernels need it: {CUDA_EXTRA}")
    return Check("triton", "warn", f"not installed: {ONLY_GPUS}", CUDA_EXTRA)


def nvrtc() -> Check:
    from supersonic_moe.jit import JitError, nvrtc_version

    try:
        major, minor = nvrtc_version()
    except JitError as error:
        found = f"cannot compile kernels: {error}" if gpus() else f"not installed: {ONLY_GPUS}"
        return Check("nvrtc", "warn", found, CUDA_EXTRA)
    return Check("nvrtc", "ok", f"{major}.{minor}, compiles for sm_90a")


def cuda_bindings() -> Check:
    try:
        return Check("cuda-bindings", "ok", importlib.metadata.version("cuda-bindings"))
    except importlib.metadata.PackageNotFoundError:
        found = "compiled kernels cannot be launched" if gpus() else ONLY_GPUS
        return Check("cuda-bindings", "warn", f"not installed: {found}", CUDA_EXTRA)


# ---- several GPUs --------------------------------------------------------------------------------------------------


def peer_access() -> Check:
    """How each GPU reads each other one, as a matrix; NVLinks of a GPU where NVML tells."""
    paths = {(i, j): _path(i, j) for i in gpus() for j in gpus()}
    rows = ["from \\ to  " + "".join(f"{f'cuda:{j}':<8}" for j in gpus()).rstrip()]
    for i in gpus():
        links = _nvlinks(i)
        cells = "".join(f"{paths[i, j]:<8}" for j in gpus()).rstrip()
        rows.append(f"{f'cuda:{i}':<11}{cells}" + ("" if links is None else f"   {links} NVLinks"))
    if "none" not in paths.values():
        return Check("peer access", "ok", "\n".join(rows))
    fix = "GPUs that do not read each other exchange tokens through the host: see `nvidia-smi topo -p2p r`"
    return Check("peer access", "warn", "\n".join(rows), fix)


def _path(i: int, j: int) -> str:
    """From GPU ``i`` to ``j``: "-", "NVLink", "PCIe", "P2P" where nobody tells which of the two, or "none"."""
    if i == j:
        return "-"
    if not torch.cuda.can_device_access_peer(i, j):
        return "none"
    from supersonic_moe.bench.sensor import open_nvml

    found = [open_nvml(torch.device("cuda", index)) for index in (i, j)]
    if found[0] is None or found[1] is None:
        return "P2P"
    (nvml, one), (_, other) = found[0], found[1]
    try:
        status = nvml.nvmlDeviceGetP2PStatus(one, other, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except nvml.NVMLError:
        return "P2P"
    return "NVLink" if status == nvml.NVML_P2P_STATUS_OK else "PCIe"


def _nvlinks(index: int) -> int | None:
    """Active NVLinks of a GPU; None without NVML."""
    from supersonic_moe.bench.sensor import open_nvml

    if (found := open_nvml(torch.device("cuda", index))) is None:
        return None
    nvml, handle = found
    active = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += nvml.nvmlDeviceGetNvLinkState(handle, link)
        except nvml.NVMLError:  # past the last link of this chip
            break
    return active


def symmetric_memory() -> Check:
    """Import only: allocating it would create a process group."""
    try:
        import torch.distributed._symmetric_memory  # noqa: F401
    except ImportError as error:
        fix = "expert parallelism over NVLink needs a torch with torch.distributed._symmetric_memory"
        return Check("symmetric memory", "warn", f"missing: {error}", fix)
    return Check(
        "symmetric memory", "ok", "torch.distributed._symmetric_memory is there (NVLink multicast is never used)"
    )


# ---- kernels -------------------------------------------------------------------------------------------------------


def compiled_kernels() -> Check:
    """What ``make wheel`` put into the package."""
    from supersonic_moe.kernels.carried import carried

    counts = carried()
    if "Triton" in counts:
        from supersonic_moe.kernels.triton import shipped

        if shipped.FOLDER.is_dir() and not shipped.index():
            fix = "`make wheel` compiles them again; in an installation, reinstall supersonic-moe"
            return Check("compiled kernels", "warn", "those in Triton are of other sources than this package", fix)
    if not any(counts.values()):
        return Check("compiled kernels", "ok", "none in the package: each is compiled at its first use")
    return Check("compiled kernels", "ok", "in the package: " + ", ".join(f"{n} in {k}" for k, n in counts.items()))


def kernel_cache() -> Check:
    from supersonic_moe.cli.cache import describe
    from supersonic_moe.jit.cache import CACHE_DIR_VARIABLE, default_cache

    info = default_cache().info()
    if info.directory is None:
        return Check("kernel cache", "warn", describe(info))
    fix = ""
    if obstacle := why_not_writable(info.directory):
        fix = f"it cannot be written ({obstacle}), so every process compiles again: set {CACHE_DIR_VARIABLE}"
    elif info.problem:
        fix = f"{info.problem}: set {CACHE_DIR_VARIABLE} to a directory of this user"
    elif any(entry.damage for entry in info.entries):
        fix = "damaged kernels are compiled again when needed; `supersonic-moe cache clear` removes them now"
    return Check("kernel cache", "warn" if fix else "ok", describe(info), fix)


def self_test() -> Check:
    """On every Hopper GPU, compile and run TMA load -> wgmma -> TMA store; elsewhere, compile it."""
    from supersonic_moe.jit import JitError, compile_all, nvrtc_version
    from supersonic_moe.kernels.sm90 import self_test as chain

    try:
        nvrtc_version()
    except JitError:
        return Check("self test", "warn", "not run: there is no compiler", CUDA_EXTRA)
    if not hopper():
        failed = [result for result in compile_all(chain.SPECS, lambda *_: None) if result.error is not None]
        if failed:
            return Check("self test", "warn", f"does not compile: {failed[0].error}", REPORT)
        return Check("self test", "ok", "compiles for sm_90a; running it takes a Hopper GPU")
    runs = {i: chain.run_self_test(i) for i in hopper()}
    found = "\n".join(f"cuda:{i} {run.detail}" for i, run in runs.items())
    if not all(run.ok for run in runs.values()):
        return Check(
            "self test", "fail", found, "a wrong result means broken hardware or driver; anything else: " + REPORT
        )
    return Check("self test", "ok", found)


def launch_overhead() -> Check:
    from supersonic_moe.kernels.sm90.launch_probe import measure_launch_overhead

    with torch.cuda.device(hopper()[0]):
        cost = measure_launch_overhead()
    found = f"{cost.plain_us:.1f} µs of host time a launch, {cost.tensor_map_us:.1f} µs with a cached TMA descriptor"
    if cost.tensor_map_us > LAUNCH_BUDGET_US:
        fix = f"over {LAUNCH_BUDGET_US:.0f} µs, small layers wait for the host: use a CUDA graph, or a less busy CPU"
        return Check("launch overhead", "warn", found, fix)
    return Check("launch overhead", "ok", found)
