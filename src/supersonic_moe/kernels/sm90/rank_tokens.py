"""Tokens of several ranks without a collective or a copy: put where all ranks read them, and summed when they are back.

    home     post_tokens    choices into the block of every rank, x into those of the ranks that have an expert of the
                            token; two epochs told; waits for the choices of all
    there    the router and stream_experts_ranks read them in their own block; the latter writes the weighted sum of
             a token's rows here into the block of the token's rank
    home     sum_parts      tells the third epoch, waits for that of all, adds in order of ranks

R ranks, M places for each, H hidden, K choices. A block holds, of all ranks in order, x (R·M, H) e4m3 and its
scales (R·M, H / 128) where a token has an expert here, ids (R·M, K) int32, -1 in a place without a token, and weights
(R·M, K); and the parts of this rank's tokens that each rank has made, (R, M, H) bf16, where a token has an expert on
that rank.

Room
    One bank is enough, and nobody asks whether it is free: a rank posts again when it has the parts of all others,
    which they have told after reading its choices and x; and it writes parts when it has the next choices of all,
    which they have told after summing the last parts (tests/support/exchange_model.py).
Waits
    Who reads waits for a flag of the epoch (exchange_flags.py), as late as it can: the streaming kernel in the warps
    that gather x, for the ranks whose rows they gather, while the first weights arrive; sum_parts before it adds. The
    router reads what post_tokens has waited for, beside writing. Inside the streaming kernel other warps wait, too, at
    most 10 s: there a rank may take ``STREAM_LIMIT_S``. Longer ones end in post_tokens, because choices and x of a
    rank are told within microseconds.
Bytes
    Through NVLink, each way of a pair: 8 K M for choices; H + H / 32 there and 2 H back for each token that has an
    expert there. x is written, not read: stores wait for nobody, and cross once however many experts read the row.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import Tensor

from supersonic_moe.jit.launch import Kernel, Launch, kernel_of
from supersonic_moe.jit.spec import KernelSpec
from supersonic_moe.kernels.sm90.exchange_flags import ExchangeFlags
from supersonic_moe.kernels.sm90.gemm_config import multiprocessors
from supersonic_moe.quantization.block_format import blocks

EPOCHS = 3
"""Of an exchange: choices, x, parts."""
X_LEFT = 1
"""Epochs that follow that of x."""
STREAM_LIMIT_S = 5.0
ALIGNMENT = 256
POST_THREADS, SUM_THREADS = 256, 128
LINES_OF_A_WARP = 16  # post_tokens.cu
CHANNELS_OF_A_BLOCK = 8 * SUM_THREADS
CHOICE_BLOCKS = 8  # at most; each writes R·M·K / 8 words to other GPUs
BLOCKS = 4  # of sum_parts on a multiprocessor; two of post_tokens
_FLAGS = ("LDG.E.64.STRONG.SYS", "STG.E.64.STRONG.SYS", "MEMBAR.ALL.SYS", "BPT.TRAP")
SPECS = (
    KernelSpec("post_tokens", "post_tokens.cu", threads=POST_THREADS, opcodes=(*_FLAGS, "LDG.E.128.CONSTANT")),
    KernelSpec("sum_parts", "sum_parts.cu", threads=SUM_THREADS, opcodes=(*_FLAGS, "STG.E.128")),
)


class Layout(NamedTuple):
    """Bytes from the start of the data of a block to each of its regions."""

    codes: int
    scales: int
    ids: int
    weights: int
    parts: int
    end: int

    @classmethod
    def of(cls, ranks: int, places: int, hidden: int, choices: int) -> Layout:
        sizes = (
            ranks * places * hidden,
            4 * ranks * places * blocks(hidden),
            4 * ranks * places * choices,
            4 * ranks * places * choices,
            2 * ranks * places * hidden,
        )
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return cls(*starts)


class RankTokens(NamedTuple):
    """One exchange of one rank."""

    flags: ExchangeFlags
    at: Layout
    """From the start of a block here."""
    places: int
    call: int

    def arguments(self, phase: int) -> dict[str, Any]:
        """Those of a wait, which all kernels share."""
        return {**self.flags.same, "call": self.call, "phase": phase}


@functools.cache
def _kernel(name: str) -> Kernel:
    return kernel_of(next(spec for spec in SPECS if spec.name == name))


def post_tokens(
    tokens: RankTokens,
    phase: int,
    arrived: Tensor,
    x_TH: Tensor,
    x_scale_TB: Tensor | None,
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_experts: int,
    *,
    pow2: bool,
) -> Launch:
    """Choices to all ranks, x to those that need it.

    Args:
        arrived: (2,) int32 of this rank's own, zero before and after.
        x_TH: e4m3 with ``x_scale_TB``, any strides of it; or bf16, quantized here, ``pow2`` with powers of two.
        ids_TK: int32 or int64; outside [0, ``num_experts``) there is no expert. ``weights_TK`` float32. All contiguous.
    """
    (count, hidden), choices = x_TH.shape, ids_TK.shape[1]
    flags = tokens.arguments(phase)
    words = flags["ranks"] * tokens.places * choices
    choice_blocks = min(CHOICE_BLOCKS, -(-words // POST_THREADS))
    units = count * -(-blocks(hidden) // LINES_OF_A_WARP)
    x_blocks = min(-(-units // (POST_THREADS // 32)), 2 * multiprocessors(x_TH.get_device()))
    x_scale_row, x_scale_k = (0, 0) if x_scale_TB is None else x_scale_TB.stride()
    at = tokens.at
    arguments = dict(
        **flags, arrived=arrived, x=x_TH, x_bf16=int(x_scale_TB is None), x_scale=x_scale_TB,
        x_scale_row=x_scale_row, x_scale_k=x_scale_k, ids=ids_TK, wide=int(ids_TK.element_size() == 8),
        weights=weights_TK, tokens=count, places=tokens.places, hidden=hidden, choices=choices,
        num_experts=num_experts, choice_blocks=choice_blocks, codes_at=at.codes, scales_at=at.scales, ids_at=at.ids,
        weights_at=at.weights, pow2=int(pow2),
    )  # fmt: skip
    return Launch(_kernel("post_tokens"), (choice_blocks + x_blocks, 1, 1), arguments)


def sum_parts(
    tokens: RankTokens, phase: int, ids_TK: Tensor, num_experts: int, out_TH: Tensor, *, accumulate: bool
) -> Launch:
    """``out`` (T, H) bf16, contiguous: the sum of each token's parts; added to what it holds if ``accumulate``."""
    (count, hidden), ranks = out_TH.shape, tokens.flags.same["ranks"]
    units = count * -(-hidden // CHANNELS_OF_A_BLOCK)
    arguments = dict(
        **tokens.arguments(phase), ids=ids_TK, wide=int(ids_TK.element_size() == 8), tokens=count,
        places=tokens.places, hidden=hidden, choices=ids_TK.shape[1], num_experts=num_experts,
        experts_here=num_experts // ranks, parts_at=tokens.at.parts, out=out_TH, accumulate=int(accumulate),
    )  # fmt: skip
    grid = max(1, min(units, BLOCKS * multiprocessors(out_TH.get_device())))
    return Launch(_kernel("sum_parts"), (grid, 1, 1), arguments)
