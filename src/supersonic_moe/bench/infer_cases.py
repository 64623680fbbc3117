"""Cases of the inference suite: whose experts, how many tokens, and where the router sends them.

``CONTEST`` is ``moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048`` with the 19 batch sizes of its workloads
and their expert offsets (FlashInfer-Bench, MLSys 2026 contest). Its logits are not public in plain text, so they are
made:

    uniform   logits ~ N(0, 1): every expert equally likely
    skewed    + N(0, 0.2) an expert; at T 901, 11948 and 14107 a bias on this rank's experts too, found by bisection, so
              that rows a token are what a contestant printed of the real data (1340, 10501, 16158 rows)
    hot       uniform, and every token chooses one expert of this rank

Codes are normal numbers clamped to 2, scales normal and of either sign, as the contest makes them. ``MODELS`` are
slices of ten served models at five batch sizes, uniform.

Floor: the bytes of hit experts' weights and scales and of inputs and output at the copy bandwidth of an H200, or its
sustained FP8 products, whichever takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from supersonic_moe.config.grouped_routing import GroupedRouting, Scoring
from supersonic_moe.kernels.reference import local_ids, route_grouped
from supersonic_moe.kernels.reference.inference import Fp8Experts
from supersonic_moe.perf_model import H200
from supersonic_moe.quantization.block_format import E4M3, blocks

ROUTINGS = ("uniform", "skewed", "hot")
SKEW = 0.2  # standard deviation of experts' popularity: the busiest has 5.7 to 6.5 % of the rows, as in the real data
HOT = 4.0  # added to the bias of an expert: with scores of at most 1, every token chooses it
ROWS_PER_TOKEN = {901: 1340 / 901, 11948: 10501 / 11948, 14107: 16158 / 14107}


@dataclass(frozen=True)
class InferShape:
    """The experts of one rank and their router."""

    name: str
    hidden: int
    inter: int
    local: int
    rule: GroupedRouting

    @property
    def expert_bytes(self) -> int:
        codes = 3 * self.hidden * self.inter
        return codes + 4 * 3 * blocks(self.hidden) * blocks(self.inter)

    def floor(self, tokens: int, hits: int, rows: int) -> tuple[int, float]:
        """(bytes that must move, µs)."""
        per_token = self.hidden + 4 * blocks(self.hidden) + 2 * self.hidden + 4 * self.rule.num_experts
        moved = hits * self.expert_bytes + tokens * per_token
        flops = 6 * rows * self.hidden * self.inter
        return moved, 1e6 * max(moved / H200.bandwidth, flops / H200.fp8_flops)


@dataclass(frozen=True)
class InferCase:
    shape: InferShape
    tokens: int
    offset: int = 0
    routing: str = "uniform"

    def __str__(self) -> str:
        return f"{self.shape.name}_T{self.tokens}_{self.routing}"


def _sigmoid(experts: int, factor: float = 1.0, top_k: int = 8) -> GroupedRouting:
    return GroupedRouting(num_experts=experts, top_k=top_k, n_group=1, topk_group=1, scaling_factor=factor)


def _softmax(experts: int, top_k: int = 8) -> GroupedRouting:
    return replace(_sigmoid(experts, top_k=top_k), scoring=Scoring.SOFTMAX)


_DEEPSEEK = GroupedRouting(num_experts=256, top_k=8, n_group=8, topk_group=4, scaling_factor=2.5)
DEEPSEEK_EP8 = InferShape("ds", 7168, 2048, 32, _DEEPSEEK)

#: (T, local_expert_offset) of the contest's workloads.
_WORKLOADS = (
    (1, 32), (7, 192), (14, 0), (15, 32), (16, 224), (32, 32), (52, 160), (53, 32), (54, 128), (55, 128), (56, 64),
    (57, 96), (58, 64), (59, 160), (62, 96), (80, 96), (901, 96), (11948, 128), (14107, 32),
)  # fmt: skip
CONTEST = tuple(
    InferCase(DEEPSEEK_EP8, tokens, offset, routing) for routing in ROUTINGS for tokens, offset in _WORKLOADS
)

#: Where a checkpoint splits experts over ranks, the share of one rank; with tensor parallelism, all experts, narrow.
SHAPES = (
    InferShape("deepseek-v3-tp8", 7168, 256, 256, _DEEPSEEK),
    InferShape("kimi-k2-ep8", 7168, 2048, 48, _sigmoid(384, 2.827)),
    InferShape("glm-5-ep8", 6144, 2048, 32, _sigmoid(256, 2.5)),
    InferShape("glm-4.6-tp8", 5120, 192, 160, _sigmoid(160, 2.5)),
    InferShape("minimax-m2-tp8", 3072, 192, 256, _sigmoid(256)),
    InferShape("minimax-m2-ep8", 3072, 1536, 32, _sigmoid(256)),
    InferShape("qwen3-235b-ep8", 4096, 1536, 16, _softmax(128)),
    InferShape("qwen3-30b", 2048, 768, 128, _softmax(128)),
    InferShape("qwen3-next-tp4", 2048, 128, 512, _softmax(512, top_k=10)),
    InferShape(
        "deepseek-v4-flash-ep8", 4096, 2048, 32,
        replace(_sigmoid(256, 1.5, top_k=6), scoring=Scoring.SQRT_SOFTPLUS),
    ),
)  # fmt: skip
MODELS = tuple(InferCase(shape, tokens) for shape in SHAPES for tokens in (1, 16, 64, 512, 4096))
SETS = {"ds": CONTEST, "models": MODELS}

#: What a CPU measures in seconds: the same code paths.
CPU_CASES = tuple(
    InferCase(InferShape("tiny", 256, 128, 8, replace(_DEEPSEEK, num_experts=64)), tokens, 8, routing)
    for tokens, routing in ((1, "uniform"), (5, "skewed"), (19, "hot"))
)


def parse(text: str) -> InferCase:
    """The name of a case, as ``ds_T80_skewed``."""
    known = {str(case): case for cases in SETS.values() for case in cases}
    if text not in known:
        raise ValueError(f"a case is named like {next(iter(known))} or {MODELS[0]}; got {text!r}.")
    return known[text]


# ---- tensors ---------------------------------------------------------------------------------------------------------


def random_experts(shape: InferShape, device: torch.device) -> Fp8Experts:
    """Weights as the contest makes them: rows of up first, then gate; blocks of 128 x 128, signed scales."""

    def codes(*size: int) -> Tensor:
        out = torch.empty(size, dtype=E4M3, device=device)
        for expert in out:
            expert.copy_(_codes(device, *size[1:]))
        return out

    def scales(*size: int) -> Tensor:
        return torch.randn(size, device=device)

    local, hidden, inter = shape.local, shape.hidden, shape.inter
    return Fp8Experts(
        codes(local, 2 * inter, hidden),
        scales(local, 2 * blocks(inter), blocks(hidden)),
        codes(local, hidden, inter),
        scales(local, blocks(hidden), blocks(inter)),
    )


def _codes(device: torch.device, *size: int) -> Tensor:
    return torch.randn(size, device=device).clamp(-2, 2).to(E4M3)


@dataclass
class Workload:
    """One call: tensors, where its tokens go, and what that costs at least."""

    case: InferCase
    experts: Fp8Experts
    logits: Tensor
    bias: Tensor
    x: Tensor
    x_scale: Tensor  # (H / 128, T)
    weights: Tensor = field(init=False)  # (T, K) of the reference
    ids: Tensor = field(init=False)
    counts: list[int] = field(init=False)  # rows of each local expert

    def __post_init__(self) -> None:
        self.weights, self.ids = route_grouped(self.logits, self.bias, self.case.shape.rule)
        local = self.local_ids()
        self.counts = torch.bincount(local[local >= 0], minlength=self.case.shape.local).tolist()

    def local_ids(self) -> Tensor:
        return local_ids(self.ids, self.case.shape.local, self.case.offset)

    @property
    def hits(self) -> int:
        return sum(count > 0 for count in self.counts)

    @property
    def rows(self) -> int:
        return sum(self.counts)


def workload(case: InferCase, experts: Fp8Experts, device: torch.device, seed: int = 0) -> Workload:
    """``seed``: other tokens with each."""
    torch.manual_seed(case.tokens + 1_000_003 * seed)
    shape, rule = case.shape, case.shape.rule
    popularity = torch.randn(rule.num_experts, device=device) * SKEW * (case.routing == "skewed")
    bias = torch.zeros(rule.num_experts, device=device)
    if case.routing == "skewed" and case.tokens in ROWS_PER_TOKEN and rule is _DEEPSEEK:
        bias = _calibrated(case, popularity, ROWS_PER_TOKEN[case.tokens])
    if case.routing == "hot":
        bias[case.offset + shape.local // 2] = HOT
    x = _codes(device, case.tokens, shape.hidden)
    x_scale = torch.randn(blocks(shape.hidden), case.tokens, device=device)
    while True:  # a single token has an expert here with a chance of one in two
        logits = torch.randn(case.tokens, rule.num_experts, device=device) + popularity
        work = Workload(case, experts, logits, bias.bfloat16(), x, x_scale)
        if work.rows:
            return work


def _calibrated(case: InferCase, popularity: Tensor, rows_per_token: float) -> Tensor:
    """The bias on this rank's experts at which a token has so many rows here."""
    probe = torch.randn(2048, popularity.shape[0], device=popularity.device) + popularity
    here = torch.zeros_like(popularity)
    here[case.offset : case.offset + case.shape.local] = 1
    return bisect(partial(_rows_per_token, case, probe, here), rows_per_token) * here


def _rows_per_token(case: InferCase, probe: Tensor, here: Tensor, bias: float) -> float:
    _, ids = route_grouped(probe, bias * here, case.shape.rule)
    return float((here[ids.long()] > 0).sum()) / probe.shape[0]


def bisect(rising: Callable[[float], float], wanted: float, low: float = -0.5, high: float = 0.5) -> float:
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2
