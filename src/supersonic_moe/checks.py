"""Argument checks. Each says the constraint, what was given and the fix.

Most look at metadata only (no sync). ``valid_*``, ``finite_*`` and ``counts_suffice`` read device data, so they cost a
synchronisation; they run under ``validate=True`` only.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections.abc import Sequence
from enum import StrEnum
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from supersonic_moe.private_api import promise

log = logging.getLogger("supersonic_moe")

Kind = TypeVar("Kind", bound=StrEnum)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120  # a router config whole; of a list its first six elements


def short(value: object) -> str:
    """Its repr, cut where it would fill a screen."""
    return _SHORT.repr(value)


_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PLAIN = {Tensor, nn.Parameter}
_INTEGERS = (int, torch.SymInt)


def describe(t: object) -> str:
    if isinstance(t, Tensor):
        return f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)} on {t.device}"
    return f"{type(t).__name__} ({short(t)})"


def tensor(name: str, t: object, rank: int, shape: object) -> None:
    """``shape`` is only printed: the names of the axes, or their sizes."""
    if type(t) not in _PLAIN:  # most are, and this is the cheapest question
        _of_this_process(name, t, shape)
    assert isinstance(t, Tensor)
    strided(name, t)  # first, because a nested tensor has no shape to describe
    if t.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {shape}; got {describe(t)}. Reshape it before the call.")


def _of_this_process(name: str, t: object, shape: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}; got {describe(t)}.")
    if hasattr(t, "to_local"):
        raise TypeError(
            f"{name} must be a tensor of this process; got a {type(t).__name__}, {describe(t)}. Pass its .to_local(). "
            "With FSDP2 shard the MoE as one unit, fully_shard(moe); for experts spread over ranks use "
            "parallel.ExpertParallel."
        )


def strided(name: str, t: Tensor) -> None:
    if t.layout is torch.strided and not t.is_nested:
        return
    kind = "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
    raise TypeError(
        f"{name} must be a dense tensor; got a {kind} tensor. Of a jagged one pass its tokens as rows, x.values(), of "
        "any other x.to_dense()."
    )


def floating(name: str, t: Tensor) -> None:
    if t.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be bfloat16, float16, float32 or float64; got {describe(t)}. "
            f"Convert it with .to(torch.bfloat16)."
        )


def floating_dtype(name: str, dtype: object) -> None:
    if dtype not in _FLOATING:
        raise TypeError(f"{name} must be a float dtype; got {short(dtype)}. Use torch.float32, for instance.")


def ids(name: str, t: object, rank: int) -> None:
    tensor(name, t, rank, "(T, K)" if rank == 2 else "(S,)")
    assert isinstance(t, Tensor)
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64; got {describe(t)}. Convert it with .to(torch.int32).")
    if rank == 2 and t.shape[1] < 1:
        raise ValueError(f"{name} must have at least one choice per token; got {describe(t)}.")
    index_count(f"elements of {name}", t.numel())


def same_device(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(
            f"{name_a} and {name_b} must be on one device; got {a.device} and {b.device}. Move one with .to(device)."
        )


def same_dtype(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.dtype != b.dtype:
        autocast = "" if torch.float64 in (a.dtype, b.dtype) else ", or run under torch.autocast"  # leaves fp64 alone
        raise TypeError(
            f"{name_a} and {name_b} must have one dtype; got {describe(a)} and {describe(b)}. "
            f"Convert one with .to(dtype){autocast}."
        )


def same_shape(name_a: str, a: Tensor, name_b: str, b: object) -> None:
    if not isinstance(b, Tensor):
        raise TypeError(f"{name_b} must be a torch.Tensor; got {describe(b)}.")
    strided(name_b, b)
    if a.shape != b.shape:
        raise ValueError(f"{name_b} must have the shape of {name_a}, {tuple(a.shape)}; got {describe(b)}.")


def same_length(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{name_a} and {name_b} must have one length; got {a.shape[0]} and {b.shape[0]}.")


def dense(name: str, t: Tensor) -> None:
    """Rows, or in a 3-D weight rows or columns, must be contiguous: kernels read 16 bytes at a time along one
    dimension.
    """
    if t.is_contiguous():  # the common case, at a tenth of the time
        return
    allowed = (-1, -2) if t.dim() == 3 else (-1,)
    if t.numel() and not any(t.stride(d) == 1 or t.shape[d] == 1 for d in allowed):
        which = "one of its last two dimensions" if t.dim() == 3 else "its last dimension"
        raise ValueError(
            f"{name} must be contiguous in {which}; got strides {t.stride()} for shape {tuple(t.shape)}. "
            f"Call .contiguous()."
        )
    if t.numel() and any(stride == 0 and n > 1 for stride, n in zip(t.stride(), t.shape, strict=True)):
        raise ValueError(
            f"{name} must not be an expanded view; got strides {t.stride()} for shape {tuple(t.shape)}. "
            f"Call .contiguous()."
        )


def dense_rows(name: str, t: Tensor) -> Tensor:
    """``t``, copied if its rows are not contiguous or are one and the same: of an input, a view is fine."""
    if t.is_contiguous() or not t.numel():
        return t
    rows, columns = t.stride()
    if columns == 1 and (rows or t.shape[0] == 1):
        return t
    log.debug("%s is copied, because kernels read whole rows: strides %s", name, (rows, columns))
    return t.contiguous()


def size(name: str, what: str, got: object, want: object, why: str) -> None:
    if got != want:
        raise ValueError(f"{name} must have {what} {want} ({why}); got {got}.")


def member(what: str, value: str, kind: type[Kind]) -> Kind:
    """The member of that name."""
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"unknown {what} {short(value)}; choose one of {', '.join(kind)}.") from None


def positive(name: str, value: object) -> None:
    if not isinstance(value, _INTEGERS) or isinstance(value, bool):
        raise TypeError(f"{name} must be a positive integer; got {describe(value)}.{_as_int(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")


def _as_int(value: object) -> str:
    whole = isinstance(value, Integral) and not isinstance(value, bool)  # as those of numpy, which no op takes
    return " Convert it with int(...)." if whole else ""


def positive_sizes(**sizes: object) -> None:
    for name, value in sizes.items():
        positive(name, value)


def non_negative(name: str, value: object) -> None:
    if not isinstance(value, _INTEGERS) or isinstance(value, bool):
        raise TypeError(f"{name} must be a non-negative integer; got {describe(value)}.{_as_int(value)}")
    if value < 0:
        raise ValueError(f"{name} must not be negative; got {value}.")


def number(name: str, value: object, *, lowest: float = -math.inf) -> None:
    """A finite number that is not below ``lowest``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {describe(value)}. Convert it with float(...).")
    found = as_float(value)
    if not (-math.inf < found < math.inf and found >= lowest):  # isfinite does not trace
        bound = "" if lowest == -math.inf else f" and at least {lowest:g}"
        raise ValueError(f"{name} must be finite{bound}; got {value}.")


def as_float(value: Any) -> float:
    """Infinite where no float is as large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {describe(value)}.")


def token_mask(name: str, mask: object, like: Tensor) -> None:
    """Bool, one for each row of ``like`` (..., E)."""
    if isinstance(mask, Tensor):
        strided(name, mask)
    shape = tuple(like.shape[:-1])
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or tuple(mask.shape) != shape:
        raise TypeError(
            f"{name} must be a bool tensor of shape {shape}, False for padding; got {describe(mask)}. "
            "Compare the padding id: token_ids != pad_id."
        )
    same_device(name, mask, "the tokens", like)


def choices_fit(k: int, num_experts: int) -> None:
    positive("num_experts_per_tok (K)", k)
    if k > num_experts:
        raise ValueError(
            f"num_experts_per_tok (K) must not exceed the number of experts; got K = {k} with E = {num_experts}."
        )


def index_count(what: str, count: int) -> None:
    if torch.compiler.is_compiling():
        promise(count < 2**31)  # a comparison would ask for a size that may depend on data
    elif count >= 2**31:
        raise ValueError(
            f"{what} must stay below 2**31 (indices are int32); got {count}. Split the batch into micro-batches."
        )


def counts(name: str, values: object) -> None:
    """A sequence of integers, or a tensor of one dimension; on the host none of them negative."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype is torch.bool:
            raise TypeError(f"{name} must hold integers in one dimension (E,); got {describe(values)}.")
        if values.device.type != "cpu":
            return
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence or a tensor of integers (E,); got {describe(values)}.")
    for expert, n in enumerate(values):
        if not isinstance(n, Integral) or isinstance(n, bool):
            raise TypeError(f"{name} must hold integers; expert {expert} has {describe(n)}.")
        if n < 0:
            raise ValueError(f"{name} must not hold negative counts; expert {expert} has {n}.")


# ---- checks that read device data ------------------------------------------------------------------------------------


def valid_topk_ids(ids_TK: Tensor, num_experts: int, *, sentinel: bool = True) -> None:
    high = num_experts if sentinel else num_experts - 1
    bad = (ids_TK < -1) | (ids_TK > high)
    _raise_if(
        bad,
        ids_TK,
        f"expert ids must lie in [-1, {high}]" + (f" (-1 and {num_experts} mark skipped choices)" if sentinel else ""),
    )
    in_order = ids_TK.sort(dim=1).values
    repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0) & (in_order[:, 1:] < num_experts)
    _raise_if(repeated, in_order[:, 1:], "a token must not name an expert twice")


def valid_triples(tokens_S: Tensor, experts_S: Tensor, num_tokens: int, num_experts: int) -> None:
    _raise_if((tokens_S < 0) | (tokens_S >= num_tokens), tokens_S, f"token indices must lie in [0, {num_tokens})")
    _raise_if((experts_S < -1) | (experts_S > num_experts), experts_S, f"expert ids must lie in [-1, {num_experts}]")
    routed = (experts_S >= 0) & (experts_S < num_experts)
    pair = (tokens_S.long() * num_experts + experts_S.long())[routed].sort().values
    _raise_if(pair[1:] == pair[:-1], pair[1:] // num_experts, "a (token, expert) pair must not come twice; token")


def valid_offsets(offs_E: Tensor, num_rows: int) -> None:
    _raise_if((offs_E < 0) | (offs_E > num_rows), offs_E, f"offs must lie in [0, {num_rows}], the number of rows")
    _raise_if(offs_E[1:] < offs_E[:-1], offs_E[1:], "offs must not decrease (they are cumulative ends)")


def counts_suffice(name: str, counts_E: Tensor, ids: Tensor) -> None:
    flat = ids.reshape(-1).long()
    seen = torch.bincount(flat[flat >= 0], minlength=counts_E.shape[0])
    given = counts_E.to(seen.device).long()
    _raise_if(given < seen, given, f"{name} must not be less than the number of ids of each expert")


def finite_logits(logits_TE: Tensor) -> None:
    bad = logits_TE.isnan()
    _raise_if(bad, logits_TE, "router logits must not be NaN")


def finite_scores(name: str, scores: Tensor) -> None:
    _raise_if(~scores.isfinite(), scores, f"{name} must be finite")


def _raise_if(bad: Tensor, values: Tensor, constraint: str) -> None:
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(f"{constraint}; got {values[where].item()} at index {where if len(where) > 1 else where[0]}.")
