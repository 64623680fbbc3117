"""FP8 copies of a layer's weights, and the rule that keeps them from going stale.

Quantizing moves 4 bytes a weight: at least 106 us for the 113 M weights of 8 gated experts of 3072 x 1536 on an H200,
about 2 % of a training step of 8192 tokens. Too little to risk a stale weight, and nothing shows reliably that one has
changed:

    change                                               version counter    data pointer    torch.optim hook
    w.add_(..), w.copy_(..) under no_grad                counts             stays           -
    load_state_dict                                      counts             stays           -
    optimizer.step(), foreach                            counts             stays           runs
    optimizer.step(), fused=True                         stays              stays           runs
    w.data.copy_(..): Megatron's and EMA's copies        stays              stays           -
    w.data = .., .to(device)                             stays              may come back   -
    torch.utils.swap_tensors                             that of the other  changes         -
    all-gather of FSDP2 into the unsharded weight        stays              may stay        -
    replay of a CUDA graph that holds the optimizer      stays              stays           -

So **every forward quantizes**, unless the caller says that weights stay as they are:

    with supersonic_moe.constant_weights(model):         # the micro-batches of one optimizer step, or an evaluation
        for batch in micro_batches:
            loss(model(batch)).backward()
    optimizer.step()

Inside, a copy is used again while every sign above still agrees: the tensor and its storage (objects, not addresses,
which an allocator gives out again), version, pointer, shape and strides, the options of the quantizer, and no
``torch.optim`` step in between. What shows no sign
inside the block (``.data`` written in place, FSDP2 after ``load_state_dict``) is the caller's promise; ``invalidate``
takes it back. At the end of the block the copies are dropped, and so is their memory of 2 bytes a weight.

Backward needs no cache: it takes the bytes that forward kept for it.

Never cached: inside a CUDA graph capture, where the quantizing kernels become part of the graph, so that a replay sees
the weights of that moment (a copy made before the capture would be frozen into it); under ``torch.compile``, for the
same reason; and weights made in ``torch.inference_mode``, which have no version counter. A copy belongs to the CUDA
stream that made it, because another stream would have to wait for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from supersonic_moe.private_api import base_of, transforms_active, versions_of


class Fp8Weight(NamedTuple):
    """One weight as ``quantize_weights`` gives it."""

    q: Tensor
    """(E, N, K)"""
    transposed: Tensor | None
    """(E, K, N); None where it is not kept. Its scales are ``scale.mT``."""
    scale: Tensor
    """(E, N/128, K/128)"""


Quantize = Callable[[Sequence[int]], list[Fp8Weight]]
"""Copies of the weights of these indices."""


class _Entry(NamedTuple):
    owner: Tensor
    """Not a weak reference: ``torch.utils.swap_tensors`` refuses tensors that have one."""
    storage: weakref.ref[torch.UntypedStorage]
    """Weak, so that a weight can be moved off a GPU meanwhile."""
    signs: tuple[object, ...]
    quantized: Fp8Weight


class WeightCache:
    """The FP8 weights of one layer. Empty, and without effect, outside :meth:`hold`."""

    def __init__(self) -> None:
        self._holds = 0
        self._entries: dict[int, _Entry] = {}

    def __reduce__(self) -> tuple[type[WeightCache], tuple[()]]:
        """Copies and pickles of a layer start with an empty cache."""
        return WeightCache, ()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """The weights stay as they are inside: quantize each once. May be nested; a ``torch.optim`` step drops all."""
        hook = register_optimizer_step_post_hook(lambda *_: self.invalidate())
        self._holds += 1
        try:
            yield
        finally:
            hook.remove()
            self._holds -= 1
            if not self._holds:
                self.invalidate()

    def invalidate(self) -> None:
        """Quantize again at the next forward: after a change inside :meth:`hold` that shows no sign."""
        self._entries.clear()

    def get(self, weights: Sequence[Tensor], options: tuple[object, ...], quantize: Quantize) -> list[Fp8Weight]:
        """``quantize`` of the indices of all ``weights``; or only of those that it has not got here before for the same
        weight and ``options``, and what it gave for the others.

        ``weights`` are the tensors as the caller passed them, always in the same places; a view stands for its base.
        """
        everything = range(len(weights))
        if (
            not self._holds
            or torch.compiler.is_compiling()
            or transforms_active()  # whose tensors have no address
            or any(weight.is_inference() or _capturing(weight) for weight in weights)
        ):
            return quantize(everything)
        owners = [base_of(weight) for weight in weights]
        signs = [(*_signs(weight), *options) for weight in weights]
        storages = [weight.untyped_storage() for weight in weights]
        entries = [self._entries.get(i) for i in everything]
        missing = [
            i
            for i, entry in enumerate(entries)
            if entry is None
            or entry.owner is not owners[i]
            or entry.storage() is not storages[i]
            or entry.signs != signs[i]
        ]
        made = dict(zip(missing, quantize(missing), strict=True)) if missing else {}
        for i, quantized in made.items():
            entries[i] = entry = _Entry(owners[i], weakref.ref(storages[i]), signs[i], quantized)
            if type(quantized.q) is Tensor:  # a mode's own kind (fake tensors) is of no use once the mode has ended
                self._entries[i] = entry
        return [entry.quantized for entry in entries if entry is not None]  # those found here: others may drop them


def signs_of(weights: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Signs of a change, a list for each sign: versions, pointers, strides. Maps without Python code, because a layer
    with many experts asks in each pass.
    """
    return versions_of(weights), list(map(Tensor.data_ptr, weights)), list(map(Tensor.stride, weights))


def _signs(weight: Tensor) -> tuple[object, ...]:
    stream = torch.cuda.current_stream(weight.device).cuda_stream if weight.is_cuda else 0
    place = (weight.shape, weight.dtype, weight.device, stream)
    inference_mode = torch.is_inference_mode_enabled()  # inference tensors cannot be saved for backward
    return *signs_of((weight,)), *place, inference_mode


def _capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
