"""The FP8 inference operator again, token by token in fp64 numpy, and the tensors that its tests run on.

Written from the operator's definition and not from ``kernels/reference``: scales are looked up by the index of the
element, gate and up by the index of the row, routing takes one token at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@dataclass
class Case:
    """One call's operands, e4m3 with fp32 scales; x scales are (T, H / 128)."""

    x: Tensor
    x_scale: Tensor
    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    weights: Tensor
    ids: Tensor
    order: str


def make_case(
    kind: str = "contest",
    *,
    tokens: int = 19,
    hidden: int = 256,
    inter: int = 128,
    local: int = 5,
    choices: int = 3,
    num_experts: int = 8,
    order: str = "up_gate",
    seed: int = 0,
) -> Case:
    """``contest``: the benchmark's own tensors, normal codes clamped to 2 and normal, signed scales. ``realistic``:
    normal activations and weights of 0.02, quantized. ``positive``: codes of either sign under positive scales.
    ``all_positive``: x, weights and scales positive, where a narrow accumulator is wrong.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def codes(*shape: int) -> Tensor:
        values = normal(*shape).clamp(-2, 2)
        return (values.abs() if kind == "all_positive" else values).to(E4M3)

    def scales(*shape: int) -> Tensor:
        return normal(*shape) if kind == "contest" else normal(*shape).abs() + 0.1

    rows = math.ceil(2 * inter / 128) if order == "interleaved" else 2 * math.ceil(inter / 128)
    columns, depth = hidden // 128, math.ceil(inter / 128)
    case = Case(
        x=codes(tokens, hidden),
        x_scale=scales(tokens, columns),
        w13=codes(local, 2 * inter, hidden),
        w13_scale=scales(local, rows, columns),
        w2=codes(local, hidden, inter),
        w2_scale=scales(local, columns, depth),
        weights=torch.rand(tokens, choices, generator=g) + 0.1,
        ids=torch.stack([torch.randperm(num_experts, generator=g)[:choices] for _ in range(tokens)]).int()
        if tokens
        else torch.empty(0, choices, dtype=torch.int32),
        order=order,
    )
    if kind == "realistic":
        for name, spread in (("x", 1.0), ("w13", 0.02), ("w2", 0.02)):
            values = normal(*getattr(case, name).shape) * spread
            scale = getattr(case, f"{name}_scale")
            scale.fill_(values.abs().max().item() / 448)
            setattr(case, name, (values / scale.flatten()[0]).to(E4M3))
    return case


def silu(v: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return v / (1 + np.exp(-v))


def gate_row(channel: int, inter: int, order: str) -> tuple[int, int]:
    """(row of gate, row of up) of a channel."""
    if order == "interleaved":
        return 2 * channel, 2 * channel + 1
    return (channel, inter + channel) if order == "gate_up" else (inter + channel, channel)


def weight_values(case: Case, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(gate (I, H), up (I, H), down (H, I)) of an expert in fp64."""
    hidden, inter = case.w2.shape[1:]
    column = np.arange(hidden) // 128
    w13, s13 = case.w13[expert].double().numpy(), case.w13_scale[expert].double().numpy()
    halves = []
    for which in range(2):
        values = np.empty((inter, hidden))
        for channel in range(inter):
            row = gate_row(channel, inter, case.order)[which]
            if case.order == "interleaved":
                block = row // 128
            else:  # blocks count from the first row of each half
                block = row // inter * math.ceil(inter / 128) + row % inter // 128
            values[channel] = w13[row] * s13[block][column]
        halves.append(values)
    s2 = case.w2_scale[expert].double().numpy()
    down = case.w2[expert].double().numpy() * s2[column][:, np.arange(inter) // 128]
    return halves[0], halves[1], down


def requantized(c: np.ndarray, pow2: bool) -> np.ndarray:
    """A vector through e4m3 with one scale for 128 elements."""
    out = np.empty_like(c)
    for start in range(0, len(c), 128):
        block = c[start : start + 128]
        scale = max(np.abs(block).max(), 2.0**-100) / 448
        if pow2:
            scale = 2.0 ** math.ceil(math.log2(scale))
        out[start : start + 128] = torch.from_numpy(block / scale).float().to(E4M3).double().numpy() * scale
    return out


def moe_loop(
    case: Case,
    *,
    local_ids: Tensor | None = None,
    limit: float | None = None,
    requantize: bool = False,
    pow2: bool = False,
    factor: float = 1.0,
    weight_on_input: bool = False,
    weight_before_down: bool = False,
    shared: Case | None = None,
) -> np.ndarray:
    """(T, H) fp64. ``local_ids`` default to the ids; anything outside [0, E_local) is skipped."""
    ids = (case.ids if local_ids is None else local_ids).tolist()
    column = np.arange(case.x.shape[1]) // 128
    out = np.zeros(case.x.shape)
    values = {e: weight_values(case, e) for e in {e for row in ids for e in row} if 0 <= e < case.w13.shape[0]}
    always = None if shared is None else weight_values(shared, 0)

    def expert(x: np.ndarray, weights: tuple[np.ndarray, np.ndarray, np.ndarray], factor: float = 1.0) -> np.ndarray:
        gate, up = weights[0] @ x, weights[1] @ x
        if limit is not None:
            gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        c = factor * silu(gate) * up
        return weights[2] @ (requantized(c, pow2) if requantize else c)

    for t, row in enumerate(ids):
        x = case.x[t].double().numpy() * case.x_scale[t].double().numpy()[column]
        for j, e in enumerate(row):
            if e in values:
                w = float(case.weights[t, j])
                if weight_on_input:
                    y = expert(x * w, values[e])
                elif weight_before_down:
                    y = expert(x, values[e], w)
                else:
                    y = w * expert(x, values[e])
                out[t] += factor * y
        if always is not None:
            out[t] += expert(x, always)
    return out


def route_token(
    logits: np.ndarray, bias: np.ndarray, *, n_group: int, topk_group: int, top_k: int, scoring: str, factor: float
) -> tuple[list[int], list[float]]:
    """Ids, best first, and weights of one token."""
    if scoring == "sigmoid":
        score = 1 / (1 + np.exp(-logits))
    elif scoring == "softmax":
        score = np.exp(logits - logits.max())
        score = score / score.sum()
    else:
        score = np.sqrt(np.logaddexp(0, logits))
    biased = [-math.inf if math.isnan(v) else v for v in score + bias]
    size = len(biased) // n_group
    worth = [sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(n_group)]
    kept = sorted(range(n_group), key=lambda g: (-worth[g], g))[:topk_group]
    inside = [e for e in range(len(biased)) if e // size in kept]
    ids = sorted(inside, key=lambda e: (-biased[e], e))[:top_k]
    total = sum(score[e] for e in ids) + 1e-20
    return ids, [float(score[e] / total * factor) for e in ids]


def errors(got: Tensor, want: np.ndarray) -> tuple[float, float]:
    """(relative Frobenius error, worst relative error of a row that is not zero)."""
    difference, want_t = got.double().cpu() - torch.from_numpy(want), torch.from_numpy(want)
    size = want_t.norm(dim=1)
    rows = (difference.norm(dim=1) / size)[size > 0]
    return float(difference.norm() / want_t.norm()), float(rows.max())
