"""Calls that have been made before: their checks, tables and packed arguments are kept, and a call only launches.

A decode step calls an operator with other contents, other addresses of activations and the same of everything else.
All that decides about a call is in its key: shapes, strides, dtypes and devices of its tensors, the addresses of
weights, and every option. No contents are; and no tensor is kept alive: one that is freed and another that takes its
address are the same to a kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from supersonic_moe.inference.operands import Sizes, checked_workspace, chunks, output
from supersonic_moe.inference.ops import Arguments, on_sm90
from supersonic_moe.inference.workspace import ALIGNMENT, workspace_bytes
from supersonic_moe.jit.replay import Replay
from supersonic_moe.kernels.alignment import ALIGNMENT as VECTOR
from supersonic_moe.private_api import current_device, dispatch_modes

KEPT = 512  # calls of a thread; then all are forgotten
_PLAIN = (Tensor, torch.nn.Parameter)
_ANYWHERE = 1 << 60  # address of a workspace that does not exist


class _Kept(NamedTuple):
    replay: Replay
    workspace_bytes: int


class _OfThread(threading.local):
    """Nobody else writes the argument buffers."""

    def __init__(self) -> None:
        self.calls: dict[Hashable, _Kept] = {}


_of_thread = _OfThread()


class Request(NamedTuple):
    """A call that may have been made before."""

    x: Tensor
    others: tuple[Tensor | None, ...]
    """Further tensors that may lie elsewhere next time, and that are only read."""
    out: Tensor | None
    workspace: Tensor | None
    key: Hashable | None
    """None where a call must go through torch's dispatcher: traced, under a dispatch mode, on a CPU, with tensors of
    another class or such as want a gradient."""

    @classmethod
    def of(
        cls, x: Tensor, others: tuple[Tensor | None, ...], out: Tensor | None, workspace: Tensor | None,
        weights: Sequence[Tensor], options: tuple[Hashable, ...],
    ) -> Request:  # fmt: skip
        return cls(x, others, out, workspace, _key(x, others, out, workspace, weights, options))

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
        addresses += [0 if t is None else t.data_ptr() for t in self.others]
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
            op(*arguments, out[first:end], workspace)
            if end - first == num_tokens:
                self.keep(arguments, out)
        return out

    def keep(self, arguments: Arguments, out: Tensor) -> None:
        """For the next time: the op has run with ``arguments`` and ``out``. Not kept are calls for which the device
        decides between kernels, such as have two tensors at one address, and such as had to copy one.
        """
        if self.key is None or not on_sm90(self.x):
            return
        from supersonic_moe.inference import sm90

        codes = [t.data_ptr() for t in arguments.weights[::2]]  # the others are their scales
        addresses = [self.x.data_ptr(), out.data_ptr(), *(t.data_ptr() for t in self.others if t is not None)]
        misplaced = any(address % VECTOR for address in (*addresses[:2], *codes))
        misplaced = misplaced or len(set(addresses)) < len(addresses)
        misplaced = misplaced or not {t.data_ptr() for t in arguments if isinstance(t, Tensor)} <= set(addresses)
        call = arguments.call(out)
        if call.tiles or misplaced:
            return
        needed = workspace_bytes(*call.sizes)
        buffers = [(self.x.data_ptr(), 1), (out.data_ptr(), 1), (_ANYWHERE, needed)]
        buffers += [(0 if t is None else t.data_ptr(), 1) for t in self.others]
        if len(_of_thread.calls) == KEPT:
            _of_thread.calls.clear()
        launches = sm90.launches(call, _ANYWHERE)
        _of_thread.calls[self.key] = _Kept(Replay(launches, self.x.get_device(), buffers), needed)


def _key(
    x: Tensor, others: tuple[Tensor | None, ...], out: Tensor | None, workspace: Tensor | None,
    weights: Sequence[Tensor], options: tuple[Hashable, ...],
) -> Hashable | None:  # fmt: skip
    if torch.compiler.is_compiling() or dispatch_modes():
        return None
    described: list[Hashable] = [options]
    wants_gradients = torch.is_grad_enabled()
    for t in (x, out, workspace, *others):
        if t is None:
            described.append(None)
        elif type(t) not in _PLAIN or (wants_gradients and t.requires_grad):
            return None
        else:
            described += (t.shape, t.stride(), t.dtype, t.get_device())
    for t in weights:
        if type(t) not in _PLAIN or not t.is_cuda:
            return None
        described += (t.data_ptr(), t.shape, t.stride(), t.dtype)
    described.append(current_device())
    return tuple(described)
