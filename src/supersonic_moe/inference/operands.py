"""Checks that both entry points share. They look at metadata only: no device data is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.config.activation import GateUpLayout
from supersonic_moe.inference.workspace import check_workspace, workspace_bytes
from supersonic_moe.quantization.block_format import BLOCK, E4M3, blocks

MAX_LOCAL_EXPERTS = 512
INTERMEDIATE_MULTIPLE = 64  # a tile of 128 weight rows holds 64 gated channels
ROW_ALIGNMENT = 16  # bytes from one weight row to the next that TMA can step
LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Sizes:
    """What the weights of a call say."""

    num_local: int
    hidden: int
    intermediate: int


def check_experts(
    w13: Tensor, w2: Tensor, w13_scale: Tensor, w2_scale: Tensor, order: GateUpLayout, of: str = ""
) -> Sizes:
    """w13 (E, 2 I, H) and w2 (E, H, I) in e4m3 with fp32 block scales. ``of`` precedes the names in messages."""
    w13_name, w2_name = f"{of}w13", f"{of}w2"
    checks.tensor(w13_name, w13, 3, "(E, 2 I, H)")
    checks.tensor(w2_name, w2, 3, "(E, H, I)")
    num_local, rows, hidden = w13.shape
    intermediate = w2.shape[2]
    checks.positive(f"the number of experts of {w13_name}", num_local)
    if num_local > MAX_LOCAL_EXPERTS:
        raise ValueError(
            f"{w13_name} must hold at most {MAX_LOCAL_EXPERTS} local experts; got {num_local}. Spread the experts over "
            "more ranks."
        )
    checks.size(w2_name, "expert count", w2.shape[0], num_local, f"the experts of {w13_name}")
    checks.size(w2_name, "H (second dimension)", w2.shape[1], hidden, f"the last dimension of {w13_name}")
    checks.size(w13_name, "2 I (second dimension)", rows, 2 * intermediate, f"{w2_name} has I = {intermediate}")
    _multiple(f"H of {w13_name}", hidden, BLOCK)
    _multiple(f"I of {w2_name}", intermediate, INTERMEDIATE_MULTIPLE)
    for name, weight in ((w13_name, w13), (w2_name, w2)):
        if weight.dtype is not E4M3:
            raise TypeError(
                f"{name} must be float8_e4m3fn; got {checks.describe(weight)}. Quantize it in blocks of 128 x 128."
            )
        checks.same_device(name, weight, w13_name, w13)
        if weight.stride(2) != 1 or any(stride % ROW_ALIGNMENT or stride <= 0 for stride in weight.stride()[:2]):
            raise ValueError(
                f"{name} must have contiguous rows at multiples of {ROW_ALIGNMENT} bytes; got strides "
                f"{weight.stride()}. Call .contiguous()."
            )
    row_blocks, cut = blocks(rows), ""
    if order is not GateUpLayout.INTERLEAVED and intermediate % BLOCK:
        row_blocks, cut = 2 * blocks(intermediate), ", gate and up rows each with blocks of their own"
    _scales(f"{w13_name}_scale", w13_scale, (num_local, row_blocks, blocks(hidden)), w13, cut=cut)
    _scales(f"{w2_name}_scale", w2_scale, (num_local, blocks(hidden), blocks(intermediate)), w2)
    return Sizes(num_local, hidden, intermediate)


def check_x(name: str, x: Tensor, sizes: Sizes, w13: Tensor) -> None:
    """(T, H) with contiguous rows; its dtype is checked by the caller."""
    checks.tensor(name, x, 2, "(T, H)")
    checks.strided(name, x)
    checks.size(name, "hidden size", x.shape[1], sizes.hidden, "the last dimension of w13")
    checks.same_device(name, x, "w13", w13)
    checks.dense(name, x)
    checks.index_count("tokens", x.shape[0])


def check_x_scale(name: str, x_scale: Tensor, layout: str, x: Tensor) -> Tensor:
    """The scales as a (T, H / 128) view. ``block_major`` scales come as (H / 128, T)."""
    if layout not in ("token_major", "block_major"):
        raise ValueError(
            f"x_scale_layout must be 'token_major' for (T, H / 128) or 'block_major' for (H / 128, T); got {layout!r}."
        )
    by_token = layout == "token_major"
    shape = (x.shape[0], blocks(x.shape[1]))
    _scales(name, x_scale, shape if by_token else shape[::-1], x, dense=False)
    return x_scale if by_token else x_scale.t()


def as_offset(value: object) -> int:
    """An integer of the host; a tensor is read, which waits for its device."""
    is_tensor = isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point()
    if isinstance(value, bool) or not (is_tensor or isinstance(value, Integral | torch.SymInt)):
        raise TypeError(f"local_expert_offset must be an integer; got {checks.describe(value)}. Use 0 for no offset.")
    offset: int = int(value)  # type: ignore[call-overload]
    if not -LARGEST_ID <= offset <= LARGEST_ID:
        raise ValueError(f"local_expert_offset must fit into 32 bits, as ids do; got {offset}. Use 0 for no offset.")
    return offset


def as_factor(value: object) -> float:
    is_tensor = isinstance(value, Tensor) and value.numel() == 1
    if isinstance(value, bool) or not (is_tensor or isinstance(value, Real)):
        raise TypeError(
            f"routed_scaling_factor must be a number; got {checks.describe(value)}. Use 1.0 for no scaling."
        )
    factor = checks.as_float(value)
    if not -math.inf < factor < math.inf:  # isfinite does not trace
        raise ValueError(f"routed_scaling_factor must be a finite number; got {factor}. Use 1.0 for no scaling.")
    return factor


def output(out: Tensor | None, x: Tensor) -> Tensor:
    """``out`` checked, or a new buffer: (T, H) bf16."""
    if out is None:
        return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    checks.same_shape("x", x, "out", out)
    checks.same_device("out", out, "x", x)
    if out.dtype is not torch.bfloat16 or not out.is_contiguous():
        raise ValueError(
            f"out must be a contiguous bfloat16 tensor; got {checks.describe(out)}, strides {out.stride()}. "
            "Pass out=None to have one made."
        )
    if torch.compiler.is_compiling():
        return out
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out must not want a gradient, which no kernel here records. Pass out.detach().")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out was made in inference mode, outside of which it cannot be written to. Make it outside.")
    return out


def chunks(num_tokens: int, max_tokens_per_chunk: int | None) -> Iterator[tuple[int, int]]:
    """(first, end) of each chunk of tokens; one chunk where the maximum is None, none for no tokens."""
    if max_tokens_per_chunk is None:
        if num_tokens:
            yield 0, num_tokens  # without a loop, which a compiled graph would unroll for each T
        return
    checks.positive("max_tokens_per_chunk", max_tokens_per_chunk)
    for first in range(0, num_tokens, max_tokens_per_chunk):
        yield first, min(first + max_tokens_per_chunk, num_tokens)


def check_not_over(out: Tensor, x: Tensor) -> None:
    """Chunk by chunk ``out`` is written while x is read: it may be x itself, or lies elsewhere."""
    if torch.compiler.is_compiling() or (out.data_ptr() == x.data_ptr() and out.dtype is x.dtype):
        return
    starts, ends = zip(*((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (out, x)), strict=True)
    if max(starts) < min(ends):
        raise ValueError(
            f"with max_tokens_per_chunk, out must be x itself or lie elsewhere; got {checks.describe(out)} over a part "
            f"of {checks.describe(x)}. Pass out=None to have one made."
        )


def checked_workspace(
    workspace: Tensor | None, x: Tensor, top_k: int, sizes: Sizes, max_tokens_per_chunk: int | None
) -> None:
    """Refuses a workspace that is too small for one chunk; without one the kernels allocate what they need."""
    if workspace is not None:
        tokens = min(x.shape[0], max_tokens_per_chunk or x.shape[0])
        needed = workspace_bytes(tokens, top_k, sizes.hidden, sizes.intermediate, sizes.num_local)
        check_workspace(workspace, x, needed)


def _multiple(name: str, value: int, of: int) -> None:
    if value % of or value < of:
        raise ValueError(f"{name} must be a multiple of {of}; got {value}. Pad the weights of the checkpoint to one.")


def _scales(name: str, scale: Tensor, shape: tuple[int, ...], of: Tensor, dense: bool = True, cut: str = "") -> None:
    checks.tensor(name, scale, len(shape), shape)
    if scale.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32; got {checks.describe(scale)}. Convert it with .float().")
    checks.size(name, "shape", tuple(scale.shape), shape, f"one scale for each block of 128{cut}")
    checks.same_device(name, scale, "its codes", of)
    if dense and not scale.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {scale.stride()}. Call .contiguous().")
