"""How many tokens each expert got: of the last forward, and since the last update of a correction bias.

The update is DeepSeek-V3's (arXiv 2412.19437, section 2.1.2): after a step, the bias of an expert that got less than
the mean goes up by a fixed rate, and that of an expert that got more goes down. A step may be many forwards, so their
counts are added up, on the device: no synchronisation, and a CUDA graph that holds a forward or an update replays it.

Added is each forward once. Activation checkpointing runs a forward twice, the second time inside backward, where it is
not added. That is seen when the op runs, so a compiled layer inside a checkpoint counts once as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor

from supersonic_moe import checks
from supersonic_moe.private_api import in_backward, transforms_active

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def keep_counts(last_E: Tensor, total_E: Tensor | None, counts_E: Tensor) -> None:
    """``last = counts`` and, unless this is a forward that backward runs again, ``total += counts``, in place."""
    torch.ops.supersonic_moe.keep_counts.default(last_E, total_E, counts_E)


def add_counts(total_E: Tensor, counts_E: Tensor) -> None:
    """The second half of :func:`keep_counts`. Inside a transform of ``torch.func``, which allows no changes in place,
    nothing is counted.
    """
    if not in_backward() and not transforms_active():
        total_E.add_(counts_E)


@torch.no_grad()
def move_biases(
    biases_E: Sequence[Tensor], totals_E: Sequence[Tensor], rate: float, group: ProcessGroup | None
) -> None:
    """``bias += rate * sign(mean(total) - total)`` for each pair, exactly in integers, and ``total = 0``. Totals are
    first summed over ``group``.
    """
    sums_E = list(totals_E)
    if group is not None:
        if not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(
                f"group must be a process group of torch.distributed; got {checks.describe(group)}. Pass "
                "torch.distributed.group.WORLD, or mesh.get_group() of a DeviceMesh."
            )
        together = torch.cat(sums_E)
        torch.distributed.all_reduce(together, group=group)
        sums_E = list(together.split_with_sizes([len(total_E) for total_E in totals_E]))
    for bias_E, sum_E, total_E in zip(biases_E, sums_E, totals_E, strict=True):
        below_E = (sum_E.sum() - len(sum_E) * sum_E).sign()
        bias_E.add_(below_E.to(bias_E.dtype), alpha=rate)
        total_E.zero_()


torch.library.define("supersonic_moe::keep_counts", "(Tensor(a!) last, Tensor(b!)? total, Tensor counts) -> ()")


@torch.library.impl("supersonic_moe::keep_counts", ("cpu", "cuda"))
def _keep_counts(last: Tensor, total: Tensor | None, counts: Tensor) -> None:
    last.copy_(counts)
    if total is not None:
        add_counts(total, counts)


@torch.library.register_fake("supersonic_moe::keep_counts")  # type: ignore[untyped-decorator]
def _keep_counts_fake(last: Tensor, total: Tensor | None, counts: Tensor) -> None:
    return None
