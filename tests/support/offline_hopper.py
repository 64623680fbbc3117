"""What Triton asks of a driver when it compiles, answered as for a Hopper GPU that is not there."""

from __future__ import annotations

from triton.backends.compiler import GPUTarget


class OfflineHopper:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)
