"""Compile CUDA C++ with NVRTC, keep the cubins, launch them: see `build`, `cache`, `signature`, `launch` and `tma`."""

from supersonic_moe.jit.build import BuildResult, JitPolicyError, compile_all, policy, set_policy
from supersonic_moe.jit.cache import CacheInfo, CubinCache, default_cache
from supersonic_moe.jit.driver import LaunchError
from supersonic_moe.jit.launch import Kernel
from supersonic_moe.jit.nvrtc import CompileError, JitError, NvrtcMissingError, nvrtc_version
from supersonic_moe.jit.spec import KernelSpec, SpecError
from supersonic_moe.jit.tma import TensorMap, TensorMapError, tensor_map

__all__ = [
    "BuildResult",
    "CacheInfo",
    "CompileError",
    "CubinCache",
    "JitError",
    "JitPolicyError",
    "Kernel",
    "KernelSpec",
    "LaunchError",
    "NvrtcMissingError",
    "SpecError",
    "TensorMap",
    "TensorMapError",
    "compile_all",
    "default_cache",
    "nvrtc_version",
    "policy",
    "set_policy",
    "tensor_map",
]
