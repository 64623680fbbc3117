"""SGLang's Triton fused MoE as a contender: its kernel, imported from an unpacked wheel, between our glue.

The kernel is in ``sglang/kernels/ops/moe/fused_moe_triton_kernels.py``, the default of SGLang on Hopper and close to
vLLM's. That file imports a dozen names of the rest of SGLang, which wants sixty packages; only the kernel is run, so
stand-ins with the answers of a Hopper GPU take their place while it is imported.

Both products have one configuration, as in SGLang (they share the row blocks). ``fastest`` captures both products under
each configuration of ``SWEEP`` in a CUDA graph, takes the median of a few cold replays, and keeps the best;
``untuned`` is SGLang's ``get_default_config`` for block-wise FP8, what its users get without a configuration file for
their shape.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supersonic_moe.bench import infer_glue as glue
from supersonic_moe.bench.infer_cases import Workload
from supersonic_moe.bench.infer_parts import Call, new_out, sorted_rows, whole_blocks
from supersonic_moe.bench.timing import Clock, Missing, attempt, clock_for
from supersonic_moe.kernels.triton.tiling import cdiv
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

FILE = Path("sglang/kernels/ops/moe/fused_moe_triton_kernels.py")
REPLAYS = 7
FEW_ROWS = 32  # rows of an expert up to which blocks of 16 rows are tried, and beyond which blocks of 128


class Config(NamedTuple):
    block_m: int
    block_n: int
    stages: int
    warps: int
    weights_by_tma: bool
    group_m: int

    def launch(self) -> dict[str, int]:
        """As ``invoke_fused_moe_kernel`` takes it. It swaps the operands itself where block_m < 64 <= block_n."""
        return {
            "BLOCK_SIZE_M": self.block_m, "BLOCK_SIZE_N": self.block_n, "BLOCK_SIZE_K": BLOCK,
            "GROUP_SIZE_M": self.group_m, "num_warps": self.warps, "num_stages": self.stages,
        }  # fmt: skip


UNTUNED = Config(64, 128, 3, 4, False, 32)


def sweep(rows_per_expert: float) -> list[Config]:
    """24 configurations around those in SGLang's files for the H200."""
    sizes = (16, 32, 64) if rows_per_expert <= FEW_ROWS else (32, 64, 128)
    return [
        Config(m, n, stages, 8 if m * n >= 128 * 128 else 4, tma, 1 if rows_per_expert <= FEW_ROWS else 16)
        for m in sizes
        for n in (64, 128)
        for stages in (3, 4)
        for tma in (False, True)
    ]


def untuned(work: Workload) -> Call:
    whole_blocks(work)
    return _operator(work, UNTUNED)[0]


def fastest(work: Workload) -> Call:
    """The operator under the configuration whose two products replay fastest."""
    whole_blocks(work)
    hits = max(1, work.hits)
    clock = clock_for(work.x.device, cold_l2=True)
    found: dict[Config, float] = {}
    reasons: list[str] = []
    for config in sweep(work.rows / hits):
        us = attempt(functools.partial(_products_us, work, config, clock))
        if isinstance(us, Missing):
            reasons.append(us.reason)
        else:
            found[config] = us
    if not found:
        raise RuntimeError(f"no configuration runs: {reasons[0] if reasons else 'none was tried'}")
    return _operator(work, min(found, key=found.__getitem__))[0]


def _products_us(work: Workload, config: Config, clock: Clock) -> float:
    """Median of the two products alone."""
    run, products = _operator(work, config)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products()
    times: list[float] = clock.slice(graph.replay, 2, REPLAYS).times_us
    return statistics.median(times)


def _operator(work: Workload, config: Config) -> tuple[Call, Callable[[], None]]:
    """(the operator, its two products on what the last call of it left behind)."""
    kernels = fused_moe_kernels()
    case, experts, shape, device = work.case, work.experts, work.case.shape, work.x.device
    tokens, top_k, hidden, inter = case.tokens, shape.rule.top_k, shape.hidden, shape.inter
    slots, tile = tokens * top_k, config.block_m
    capacity = max(tile, sum(cdiv(count, tile) * tile for count in work.counts))
    z, y = (torch.empty(slots, width, dtype=torch.bfloat16, device=device) for width in (2 * inter, hidden))
    c = torch.empty(slots, inter, dtype=torch.uint8, device=device).view(E4M3)
    c_scale = torch.empty(slots, blocks(inter), device=device)
    x_scale_TB = work.x_scale.t().contiguous()  # as SGLang has them: a copy that costs it nothing here
    sort, out = sorted_rows(work, tile, capacity), new_out(work)
    state: dict[str, Any] = {}

    def multiply(a: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], to: Tensor, each: int, weigh: bool) -> None:
        weights_TK, slots_P, experts_B, end = state["rows"]
        kernels.invoke_fused_moe_kernel(
            a[0], w[0], None, to, a[1], w[1], None, weights_TK, work.ids, slots_P, experts_B, end, weigh, each,
            config.launch(), compute_type=kernels.tl.bfloat16, use_fp8_w8a8=True, use_int8_w8a8=False,
            use_int8_w8a16=False, use_int4_w4a16=False, per_channel_quant=False, block_shape=[BLOCK, BLOCK],
            b_use_tma=config.weights_by_tma,
        )  # fmt: skip

    def up() -> None:
        multiply((work.x, x_scale_TB), (experts.w13, experts.w13_scale), z, top_k, False)

    def down() -> None:
        multiply((c, c_scale), (experts.w2, experts.w2_scale), y, 1, True)

    def products() -> None:
        up()
        down()

    def run() -> Tensor:
        weights_TK, (offsets, _, slot_P, expert_P, dest_S, _) = sort()
        state["rows"] = weights_TK, *glue.block_experts(slot_P, expert_P, slots, tile), offsets[-1:]
        up()
        glue.swiglu_quantize(z, dest_S, c, c_scale, gate_first=False)
        down()
        return glue.combine(y, dest_S, None, out, by_slot=True)

    return run, products


# ---- importing one file of SGLang ------------------------------------------------------------------------------------


@functools.cache
def fused_moe_kernels() -> ModuleType:
    """The module of ``FILE``, found on ``sys.path``."""
    path = next((Path(folder) / FILE for folder in sys.path if (Path(folder) / FILE).is_file()), None)
    if path is None:
        raise ModuleNotFoundError(f"{FILE} is not on the path. Unpack SGLang's wheel into a folder of PYTHONPATH")
    spec = importlib.util.spec_from_file_location("sglang_fused_moe_triton_kernels", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    with _stand_ins():
        spec.loader.exec_module(module)
    return module


class _Stand(ModuleType):
    """A module that answers with functions that must not be called, but for the answers given."""

    def __init__(self, name: str, **answers: object) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update({key: functools.partial(_answer, value) for key, value in answers.items()})

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _no_part


def _answer(value: object, *_: object, **__: object) -> object:
    return value


def _no_part(*_: object, **__: object) -> object:
    raise RuntimeError("this function of SGLang takes no part in the block-wise FP8 kernel")


class _Flag:
    @staticmethod
    def get() -> bool:
        return False


@contextmanager
def _stand_ins() -> Iterator[None]:
    environ = _Stand("sglang.srt.environ")
    environ.__dict__["envs"] = type("envs", (), {"SGLANG_USE_AITER": _Flag})
    modules = [
        _Stand("sglang"), _Stand("sglang.kernels"), _Stand("sglang.kernels.jit"), _Stand("sglang.kernels.ops"),
        _Stand("sglang.kernels.ops.quantization"), _Stand("sglang.srt"), _Stand("sglang.srt.layers"),
        _Stand("sglang.srt.layers.moe"), environ,
        _Stand("sglang.kernels.jit.utils", is_arch_support_pdl=True),
        _Stand("sglang.kernels.ops.quantization.fp8_kernel"), _Stand("sglang.kernels.ops.quantization.int8_kernel"),
        _Stand("sglang.srt.batch_invariant_ops", is_batch_invariant_mode_enabled=False),
        _Stand("sglang.srt.layers.moe.utils", get_moe_padding_size=0),
        _Stand(
            "sglang.srt.utils", is_cuda=True, is_hip=False, is_cpu=False, cpu_has_amx_support=False,
            is_sm90_supported=True,
        ),
    ]  # fmt: skip
    before = {name: sys.modules[name] for name in list(sys.modules) if name.partition(".")[0] == "sglang"}
    sys.modules.update({module.__name__: module for module in modules})
    try:
        yield
    finally:
        for module in modules:
            del sys.modules[module.__name__]
        sys.modules.update(before)
