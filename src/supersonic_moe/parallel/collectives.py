"""Rows between all ranks of a group, by collectives of ``torch.distributed``: NCCL, gloo, any number of nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from supersonic_moe import checks
from supersonic_moe.parallel.watch import Watch

_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""torch 2.13 calls it by its first name, and warns of the other, which is all that older ones have."""


@dataclass
class Needed:
    """Which rows of a call some rank reads, for ranks that need not send the others."""

    copy_TR: Tensor
    """int32; at least 0 where a rank needs a token of this one."""
    rows: Tensor | None = None
    """(1 + U,) int32, once choices have come: how many rows from all ranks this one needs, and which."""
    zeros: bool = False
    """Rows that did not travel are zeros, for experts of a user's own. Nobody else reads them."""


class Ranks(Protocol):
    """How rows come from one rank to another. Those that are not ``needed`` may stay where they are."""

    watch: Watch

    def gather(
        self, rows_TC: Tensor, places: int, empty: int, call: int, phase: str, needed: Needed | None = None
    ) -> Tensor: ...

    def exchange(
        self,
        rows_SC: Tensor,
        call: int,
        phase: str,
        sent: Sequence[int] | None,
        received: Sequence[int] | None,
        needed: Needed | None = None,
    ) -> Tensor: ...


class Collectives:
    """Collectives of one group, each under the eyes of a :class:`Watch`. Rows travel as bytes, in any dtype."""

    def __init__(self, group: dist.ProcessGroup, watch: Watch) -> None:
        self.group, self.watch = group, watch

    def exchange(
        self,
        rows_SC: Tensor,
        call: int,
        phase: str,
        sent: Sequence[int] | None,
        received: Sequence[int] | None,
        needed: Needed | None = None,
    ) -> Tensor:
        """(U, C): what others send, in order of ranks. ``sent`` and ``received`` count rows by rank; None: an equal
        share for each.
        """
        arriving = rows_SC.shape[0] if received is None else sum(received)
        rows_UC = rows_SC.new_empty(arriving, rows_SC.shape[1])
        self._run(call, phase, rows_SC.device, dist.all_to_all_single, _bytes(rows_UC), _bytes(rows_SC), received, sent)
        return rows_UC

    def gather(
        self, rows_TC: Tensor, places: int, empty: int, call: int, phase: str, needed: Needed | None = None
    ) -> Tensor:
        """(R·places, C): the rows of each rank, in order of ranks, each followed by rows of ``empty``."""
        rows_MC = F.pad(rows_TC, (0, 0, 0, places - rows_TC.shape[0]), value=empty)
        rows_UC = rows_MC.new_empty(rows_MC.shape[0] * dist.get_world_size(self.group), rows_MC.shape[1])
        self._run(call, phase, rows_MC.device, _all_gather, _bytes(rows_UC), _bytes(rows_MC))
        return rows_UC

    def maximum(self, value: Tensor, call: int, phase: str) -> Tensor:
        """The largest ``value`` of all ranks, in place."""
        self._run(call, phase, value.device, dist.all_reduce, value, dist.ReduceOp.MAX)
        return value

    def _run(self, call: int, phase: str, device: torch.device, collective: Any, *arguments: Any) -> None:
        self.watch.enter(call, phase)
        start = time.monotonic()
        try:
            self.watch.wait(collective(*arguments, group=self.group, async_op=True), self.group, device)
        except RuntimeError as error:
            raise self.watch.failed(error, time.monotonic() - start) from error
        self.watch.leave()


def _bytes(rows: Tensor) -> Tensor:
    return elements_as(torch.uint8, rows)


def elements_as(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """``rows``, contiguous, as elements of another ``dtype``."""
    rows = rows.contiguous()
    if rows.stride(-1) != 1:  # no row, or one element: torch calls any strides contiguous, and then refuses the view
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(dtype)


def group_of(group: object) -> dist.ProcessGroup:
    """The process group of an argument: itself, or that of a mesh of one dimension."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"ExpertParallel needs a one-dimensional DeviceMesh; got {group.ndim} dimensions. Pass a slice of it, "
                'such as mesh["ep"].'
            )
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "ExpertParallel must be made on the ranks of its group; this process is not one of them (dist.new_group "
            "says so by NON_GROUP_MEMBER). Make it on those ranks only, or pass the group that holds this one."
        )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "ExpertParallel needs a process group of torch.distributed or a DeviceMesh; got "
            f"{checks.describe(group)}. Call torch.distributed.init_process_group() and pass "
            "torch.distributed.group.WORLD."
        )
    return group


def name_of(group: dist.ProcessGroup) -> str:
    """What its user called it, else what torch does."""
    described = group.group_desc
    return group.group_name if described in ("", "undefined") else described
