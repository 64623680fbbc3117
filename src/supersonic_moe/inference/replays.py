"""Calls that have been made before: their checks, tables and packed arguments are kept, and a call only launches.

The first call of a kind just runs, the second is recorded while it runs, and from the third on it is replayed. A decode
step calls an operator with other contents, other addresses of activations and the same of everything else.
All that decides about a call is in its key: shapes, strides, dtypes and devices of its tensors, the addresses of
weights, and every option. No contents are; and no tensor is kept alive: one that is freed and another that takes its
address are the same to a kernel.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.inference.operands import Sizes, check_not_over, checked_workspace, chunks, output
from supersonic_moe.inference.ops import Arguments, on_sm90
from supersonic_moe.inference.workspace import ALIGNMENT, workspace_bytes
from supersonic_moe.jit.replay import Replay, recording
from supersonic_moe.kernels.alignment import ALIGNMENT as VECTOR
from supersonic_moe.private_api import current_device, dispatch_modes

KEPT = 512  # calls of a thread; then all are forgotten
_PLAIN = (Tensor, torch.nn.Parameter)


class _Kept(NamedTuple):
    replay: Replay
    workspace_bytes: int
    aligned: bool
    """Whether one of its kernels was chosen by the alignment of its arguments."""


class _OfThread(threading.local):
    """Nobody else writes the argument buffers."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, _Kept] = {}
        self.seen: dict[Hashable, bool] = {}
        """Whether calls that have been made can be kept."""


_of_thread = _OfThread()


class Request(NamedTuple):
    """A call that may have been made before."""

    x: Tensor
    others: tuple[Tensor | None, ...]
    """Further tensors that may lie elsewhere next time, and that are only read."""
    out: Tensor | None
    workspace: Tensor | None
    options: tuple[Hashable, ...]
    key: Hashable | None
    """None where a call must go through torch's dispatcher: traced, under a dispatch mode, on a CPU,
    with tensors of another class or ones that want a gradient.
    """

    @classmethod
    def of(
        cls, x: Tensor, others: tuple[Tensor | None, ...], out: Tensor | None, workspace: Tensor | None,
        weights: Sequence[Tensor], options: tuple[Hashable, ...],
    ) -> Request:  # fmt: skip
        try:
            key = _key(x, others, out, workspace, weights, options)
        except RuntimeError:  # of a tensor that has no strides; the checks say which
            key = None
        return cls(x, others, out, workspace, options, key)

    def run(self) -> Tensor | None:
        """The result, if such a call was kept."""
        try:
            kept = _of_thread.calls.get(self.key)
        except TypeError:  # an option without a hash; the checks say what is wrong with it
            kept = None
        if kept is None:
            return None
        x, out, workspace = self.x, self.out, self.workspace
        if out is None:
            out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
        if workspace is None:
            workspace = torch.empty(kept.workspace_bytes, dtype=torch.uint8, device=x.device)
        addresses = [x.data_ptr(), out.data_ptr(), workspace.data_ptr()]
        if (addresses[0] | addresses[1]) % VECTOR or addresses[2] % ALIGNMENT:
            return None
        addresses += [t.data_ptr() for t in self.others if t is not None]
        if kept.aligned and functools.reduce(operator.or_, addresses) % VECTOR:
            return None
        kept.replay.run(addresses)
        return out

    def compute(
        self,
        op: Callable[..., None],
        part: Callable[[int, int], Arguments],
        top_k: int,
        sizes: Sizes,
        max_tokens_per_chunk: int | None,
    ) -> Tensor:
        """The result of ``op``, chunk by chunk; ``part`` gives its arguments for tokens [first, end). Kept where one
        chunk is all. A shared expert counts in ``top_k`` and ``sizes``.
        """
        x, workspace, num_tokens = self.x, self.workspace, self.x.shape[0]
        checked_workspace(workspace, x, top_k, sizes, max_tokens_per_chunk)
        out = output(self.out, x)
        for first, end in chunks(num_tokens, max_tokens_per_chunk):
            arguments = part(first, end)
            if end - first < num_tokens:
                check_not_over(out, x)
                op(*arguments, out[first:end], workspace)
            elif self.key is None or self._undecided or not self._made_before(arguments, out):
                op(*arguments, out, workspace)
            else:
                self._record(op, arguments, out)
        return out

    def _made_before(self, arguments: Arguments, out: Tensor) -> bool:
        """Whether this is the second call of its kind, and one to keep: of launches alone, without two tensors at one
        address, and without one that has to be copied.
        """
        seen = _of_thread.seen
        if self.key not in seen:
            if len(seen) == KEPT:
                seen.clear()
                _of_thread.calls.clear()
            seen[self.key] = on_sm90(self.x) and arguments.call(out).launches_only
            return False
        if not seen[self.key] or self.key in _of_thread.calls:
            return False
        addresses = [self.x.data_ptr(), out.data_ptr(), *(t.data_ptr() for t in self.others if t is not None)]
        codes = [t.data_ptr() for t in arguments.weights[::2]]  # the others are their scales
        if any(address % VECTOR for address in (*addresses[:2], *codes)) or len(set(addresses)) < len(addresses):
            return False
        return {t.data_ptr() for t in arguments if isinstance(t, Tensor)} <= set(addresses)

    @property
    def _undecided(self) -> bool:
        """Whether an option is a number in a tensor, which may be another one next time."""
        return any(isinstance(option, Tensor) for option in self.options)

    def _record(self, op: Callable[..., None], arguments: Arguments, out: Tensor) -> None:
        call, workspace = arguments.call(out), self.workspace
        needed = workspace_bytes(*call.sizes)
        if workspace is None:
            workspace = torch.empty(needed, dtype=torch.uint8, device=self.x.device)
        moving = [self.x, out, workspace, *(t for t in self.others if t is not None)]
        with recording([*moving, *arguments.weights]) as recorder:
            op(*arguments, out, workspace)
        _of_thread.seen[self.key] = recorder.possible
        if recorder.possible:
            _of_thread.calls[self.key] = _Kept(Replay(recorder, len(moving)), needed, call.tiles)


def _key(
    x: Tensor, others: tuple[Tensor | None, ...], out: Tensor | None, workspace: Tensor | None,
    weights: Sequence[Tensor], options: tuple[Hashable, ...],
) -> Hashable | None:  # fmt: skip
    if torch.compiler.is_compiling() or dispatch_modes():
        return None
    described: list[Hashable] = [options]  # strides only where the shape does not say them, for they take time
    wants_gradients = torch.is_grad_enabled()
    for t in (x, out, workspace, *others):
        if t is None:
            described.append(None)
        elif type(t) not in _PLAIN or (wants_gradients and t.requires_grad):
            return None
        else:
            described += (t.shape, t.is_contiguous() or t.stride(), t.dtype, t.get_device())
    for t in weights:
        if type(t) not in _PLAIN or not t.is_cuda:
            return None
        described += (t.data_ptr(), t.shape, t.is_contiguous() or t.stride(), t.dtype)
    described.append(current_device())
    return tuple(described)
