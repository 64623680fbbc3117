"""FLOPs, bytes and roofline time of an MoE layer, step by step.

T tokens, H hidden, I expert intermediate, E experts, K choices per token, R = T*K routed rows, N1 = 2I (gated) or I,
b bytes an element.

The steps are the eight kernels of SonicMoE (arXiv 2512.14080, section 4) with the router and the metadata around
them:

    forward    1  Z, A = act(gather(X) @ W1)        2 R H N1 FLOPs
               2  Y = A @ W2                        2 R I H
               3  O = sum over k of s_k Y           bandwidth only
    backward   4  dZ, A', dS from gather(dO) @ W2^T 2 R H I
               5  dW2 = gather(dO)^T @ A'           2 R H I
               6  dX~ = dZ @ W1^T                   2 R N1 H
               7  dW1 = gather(X)^T @ dZ            2 R H N1
               8  dX = sum over k of dX~            bandwidth only

They add up to 6 R H I FLOPs forward and 18 R H I forward + backward of a gated layer, 4 and 12 ungated. The router's
own FLOPs are listed but, as everyone does, not counted in a layer's TFLOP/s.

Bytes are compulsory bytes: every input once, every output once. A gathered operand therefore counts its T distinct
rows, not the R rows read (the K - 1 re-reads can come from L2), and only min(E, R) experts' weights are read. So a
step's roofline, max(FLOPs / rate, bytes / bandwidth), is a floor and not a prediction.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

INDEX_BYTES = 4  # routing metadata is int32, scores are fp32


@dataclass(frozen=True, order=True)
class LayerShape:
    """One MoE layer call. ``str(shape)`` is the case name used in ``benchmarks/results``."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        sizes = {"H": self.hidden, "I": self.intermediate, "E": self.experts, "K": self.top_k}
        for symbol, size in sizes.items():
            if size < 1:
                raise ValueError(f"{symbol} must be at least 1; got {size} in {self}.")
        if self.tokens < 0:
            raise ValueError(f"T must not be negative; got {self.tokens} in {self}.")
        if self.top_k > self.experts:
            raise ValueError(
                f"K must not exceed E (a token picks K different experts); got K = {self.top_k}, E = {self.experts}."
            )

    @classmethod
    def parse(cls, text: str) -> LayerShape:
        """``"8192,3072,1536,8,8"`` or ``"T8192_H3072_I1536_E8_K8"``."""
        match = re.fullmatch(r"T(\d+)_H(\d+)_I(\d+)_E(\d+)_K(\d+)", text.strip())
        sizes = match.groups() if match else text.split(",")
        if len(sizes) != 5 or not all(re.fullmatch(r"\s*\d+\s*", size) for size in sizes):
            raise ValueError(
                "a shape is five whole numbers T,H,I,E,K (tokens, hidden, intermediate, experts, top-k), "
                f"e.g. 8192,3072,1536,8,8; got {text!r}."
            )
        return cls(*(int(size) for size in sizes))

    @property
    def rows(self) -> int:
        """R, the routed rows of plain top-k."""
        return self.tokens * self.top_k

    def __str__(self) -> str:
        return f"T{self.tokens}_H{self.hidden}_I{self.intermediate}_E{self.experts}_K{self.top_k}"


@dataclass(frozen=True)
class Machine:
    """The two ceilings of a roofline, each with where its number comes from."""

    name: str
    matrix_flops: float  # FLOP/s of 16-bit matrix products that the chip sustains
    datasheet_flops: float
    bandwidth: float  # bytes/s of a large copy, read + written
    source: str
    fp8_flops: float = math.nan  # as matrix_flops and datasheet_flops, of FP8 products
    fp8_datasheet_flops: float = math.nan

    def peak_flops(self, *, fp8: bool) -> float:
        """FLOP/s of the datasheet, the denominator of MFU."""
        return self.fp8_datasheet_flops if fp8 else self.datasheet_flops


H200 = Machine(
    name="NVIDIA H200",
    matrix_flops=680e12,
    datasheet_flops=989e12,
    bandwidth=4.26e12,
    source="measured warm, at its 700 W cap: cuBLAS 8192^3 on random data, bf16 672-680 TFLOP/s, e4m3 unscaled and "
    "unpromoted 1268-1300; copy 4.26 TB/s",
    fp8_flops=1284e12,
    fp8_datasheet_flops=1979e12,
)


@dataclass(frozen=True)
class Step:
    """One step of a layer. ``flops`` are matrix FLOPs; bandwidth steps have none worth counting."""

    key: str  # "1" ... "8" as in SonicMoE, else a word
    phase: Literal["forward", "backward"]
    what: str
    flops: int
    bytes: int
    fp8: bool = False  # its products multiply e4m3

    def roofline_us(self, machine: Machine) -> float:
        return 1e6 * max(self._matrix_seconds(machine), self.bytes / machine.bandwidth)

    def bound(self, machine: Machine) -> Literal["compute", "memory"]:
        return "compute" if self._matrix_seconds(machine) > self.bytes / machine.bandwidth else "memory"

    def _matrix_seconds(self, machine: Machine) -> float:
        return self.flops / (machine.fp8_flops if self.fp8 else machine.matrix_flops) if self.flops else 0.0


#: Step -> function of the backend that runs it (training/bf16.py, routing/). A step without an entry is plain torch.
STEP_KERNELS = {
    "top-k": "route_forward",
    "metadata": "build_plan",
    "1": "up_projection",
    "2": "grouped_mm",
    "3": "gather_sum",
    "4": "down_backward",
    "5": "grouped_mm_wgrad",
    "6": "grouped_mm",
    "7": "grouped_mm_wgrad",
    "8": "gather_sum",
    "d top-k": "route_backward",
}


def layer_flops(shape: LayerShape, *, gated: bool, rows: int | None = None) -> tuple[int, int]:
    """Model FLOPs of (forward, forward + backward): (6, 18) R H I gated, (4, 12) ungated. ``rows`` is R where it is not
    T K: under token rounding.
    """
    unit = (shape.rows if rows is None else rows) * shape.hidden * shape.intermediate
    return (6 * unit, 18 * unit) if gated else (4 * unit, 12 * unit)


def saved_activation_bytes(shape: LayerShape, *, gated: bool, element_bytes: int = 2) -> int:
    """Bytes a training forward must keep: X and the pre-activation H, i.e. 2 T H + 4 R I in a gated 16-bit layer.

    Y and everything gathered are recomputed or never exist. The routing metadata, a few int32 per routed row, comes
    on top.
    """
    pre_activation = shape.rows * shape.intermediate * (2 if gated else 1)
    return element_bytes * (shape.tokens * shape.hidden + pre_activation)


def layer_steps(shape: LayerShape, *, gated: bool, element_bytes: int = 2) -> list[Step]:
    """The steps of one training call, in the order they run."""
    T, H, I, E = shape.tokens, shape.hidden, shape.intermediate, shape.experts  # noqa: E741
    R, N1, b, i = shape.rows, I * (2 if gated else 1), element_bytes, INDEX_BYTES
    hit = min(E, R)  # experts whose weights are read
    w1_read, w2_read = b * hit * N1 * H, b * hit * H * I
    w1_written, w2_written = b * E * N1 * H, b * E * H * I  # gradients of experts without rows are written too (zeros)
    token_rows, routed_rows = b * T * H, b * R * H
    pre, act = b * R * N1, b * R * I
    logits, router_weight = b * T * E, b * E * H
    scores, index = i * R, i * R
    dgated = token_rows + w2_read + 2 * pre + act + 2 * scores + index  # Z is read again to recompute A
    drouter = logits + 3 * token_rows + 2 * router_weight  # dX is read and written: this step adds to it
    return [
        Step("router", "forward", "router logits = X @ Wr", 2 * T * H * E, token_rows + router_weight + logits),
        Step("top-k", "forward", "scores, ids = softmax(top-k)", 0, logits + scores + index),
        Step("metadata", "forward", "expert offsets and row indices", 0, 5 * index + i * (E + 1)),
        Step("1", "forward", "Z, A = act(gather(X) @ W1)", 2 * R * H * N1, token_rows + w1_read + pre + act + index),
        Step("2", "forward", "Y = A @ W2", 2 * R * I * H, act + w2_read + routed_rows),
        Step("3", "forward", "O = gather-and-sum of scores * Y", 0, routed_rows + scores + index + token_rows),
        Step("4", "backward", "dZ, A', dS of gather(dO) @ W2^T", 2 * R * H * I, dgated),
        Step("5", "backward", "dW2 = gather(dO)^T @ A'", 2 * R * H * I, token_rows + act + w2_written + index),
        Step("6", "backward", "dX~ = dZ @ W1^T", 2 * R * N1 * H, pre + w1_read + routed_rows),
        Step("7", "backward", "dW1 = gather(X)^T @ dZ", 2 * R * H * N1, token_rows + pre + w1_written + index),
        Step("8", "backward", "dX = gather-and-sum of dX~", 0, routed_rows + index + token_rows),
        Step("d top-k", "backward", "d logits from dS", 0, 2 * scores + index + logits),
        Step("d router", "backward", "dX += d logits @ Wr^T, dWr", 4 * T * H * E, drouter),
    ]
