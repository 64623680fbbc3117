"""Experts that a trainer keeps one by one, as the stacked tensors that the kernels read: copies in, gradients out.

Trainers such as Megatron, torchtitan and PaddleFleet hold each expert's weights as parameters of their own, with an
fp32 ``main_grad`` on each. A store has them all in w1 (E, N1, H) and w2 (E, H, I) for the time of one step:

    copies()           before each forward: the stacked weights, copied by the first forward of a step
    after_forward()    after it: watches for its backward, which adds to fp32 buffers (E, N1, H) and (E, H, I)
    step()             adds the buffers to each ``main_grad``, and frees buffers and copies

In bytes for each weight, from the first forward to step(): 2 for the BF16 copy, or 2 for the FP8 one (e4m3 and its
transpose; BF16 is freed once they exist, unless ``keep_transposed=False`` needs it again), and 4 for the buffers. Sums
are taken in the order in which backward passes run, so the same order gives the same bits. Every pass adds, one of
``torch.autograd.grad`` for dx alone too, because nobody else could ask for the gradients of the copies.

**Which weights are seen.** Those of the first forward of a step, by all its micro-batches. The weights must not change
while gradients are under way, which is while a forward waits for its backward or a buffer waits for step(). Every
forward, backward and step() compares all weights (versions, pointers, strides, ``requires_grad``) with what was copied,
and raises where one differs; step() also finds a parameter that was replaced by another. With nothing under way every
forward copies anew, and one that autograd does not record drops its copies at once: an evaluation always sees the
weights of its moment, and leaves none behind. A ``torch.optim`` optimizer that holds one of the weights is stopped
before it changes them if gradients are under way; any other one makes the next forward copy anew, with a warning.

Some changes show no sign (``quantization/weight_cache.py`` lists them): ``.data`` written in place by Megatron's copy
of master weights or of an average of them, fused optimizers outside ``torch.optim``, all-gathers. In a training loop
they come after step(), which drops the copies, so they are seen. In the middle of a step, between two of its
micro-batches, they are not: call step() or discard() before them. The weights are read from the
parameters, not through the modules: what a forward hook of an expert module would do (Megatron's
``overlap_param_gather``) must be done before. And no autograd hook of the parameters runs (``overlap_grad_reduce``):
reduce after step().

**CUDA graphs.** All of a step, from its first forward to step(), may be captured in one graph, which then copies the
weights at each replay; a part of it may not, because buffers outlive the part. The host's checks run at capture only,
and row counts on the host are baked in; on the device they are not. A step runs on one stream.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from supersonic_moe import checks
from supersonic_moe.autocast import autocast_dtype
from supersonic_moe.config.activation import Activation
from supersonic_moe.config.recipe import Fp8Recipe, Recipe
from supersonic_moe.private_api import add_each, copy_each
from supersonic_moe.quantization.weight_cache import Fp8Weight, Quantize, WeightCache, signs_of
from supersonic_moe.training.main_grad import fits, gradient_dtype, main_grad_of, overwrites

ExpertWeights: TypeAlias = dict[str, list[Tensor]]
"""The parameters of all experts, under "w1" and "w2"."""
_Place: TypeAlias = tuple[int, bool] | None
"""Where work is queued: (CUDA stream, whether a graph is being captured); None on a CPU."""


def name_of(which: str, expert: int) -> str:
    """What errors call a weight; ``which`` is "w1" or "w2"."""
    return f"{which} of experts[{expert}]"


class _Use(NamedTuple):
    """What copies of the weights are good for."""

    dtype: torch.dtype
    recipe: Recipe
    place: _Place
    inference_mode: bool


class ExpertStore:
    """The stacked weights of one layer and their gradients, one step after the other (see the module docstring).

    Args:
        owner: the class that the trainer calls, for errors.
        hidden_size: H. intermediate_size: I. activation: makes w1 N1 = 2I rows high if gated, else I.
        transposed: the parameters are stored input by output, (H, N1) and (I, H).

    It holds no parameters between two steps: ``look_up`` gives them when a step begins and when it ends.
    """

    def __init__(
        self, owner: str, hidden_size: int, intermediate_size: int, activation: Activation, transposed: bool
    ) -> None:
        self._owner, self._transposed = owner, transposed
        self._shapes = {"w1": (activation.fan * intermediate_size, hidden_size), "w2": (hidden_size, intermediate_size)}
        self._sizes = f"hidden_size {hidden_size}, intermediate_size {intermediate_size}, {activation.type.value}"
        self._step = 0
        self._copies: list[StackedExperts] = []
        """What this step has read: one copy, or one for each stream, dtype and recipe."""
        self._waiting: weakref.WeakSet[_Pass] = weakref.WeakSet()
        """Forward passes whose backward has not run, as long as their graphs exist."""
        self._buffers: dict[str, Tensor] = {}
        self._buffers_place: _Place = None
        weakref.finalize(self, _watch_optimizers(weakref.ref(self)))

    # ---- one step ----------------------------------------------------------------------------------------------------

    def copies(self, look_up: Callable[[], ExpertWeights], device: torch.device, recipe: Recipe) -> StackedExperts:
        """The weights as they are now, for a forward on the current stream of ``device`` in the dtype of the weights,
        or of autocast.

        Raises RuntimeError if they have changed while gradients are under way, TypeError or ValueError if they do not
        fit the sizes of the store.
        """
        if self._under_way():
            self._check_unchanged()
            parameters = self._copies[0].parameters  # to look them up costs too much in the middle of a step
        else:
            parameters = look_up()
            if self._copies:
                self.discard()
        first = parameters["w1"][0]
        dtype = autocast_dtype(first) or first.dtype
        use = _Use(dtype, recipe, _place(device), torch.is_inference_mode_enabled())
        for copies in self._copies:
            if copies.use == use:
                return copies
        self.check(parameters)
        self._copies.append(StackedExperts(parameters, self._shapes, self._transposed, use))
        return self._copies[-1]

    def after_forward(self, copies: StackedExperts, out: Tensor) -> None:
        """``out`` has been computed from ``copies``: its backward will add to the buffers, or is refused. Without a
        backward the copies are gone.
        """
        if copies.only_fp8_is_read:
            copies.free_stacked()
        if out.requires_grad:
            begun = _Pass(copies, self._step)
            self._waiting.add(begun)
            out.register_hook(lambda _: self._before_backward(begun))  # type: ignore[no-untyped-call]
        elif not self._under_way():
            self.discard()

    def step(self, look_up: Callable[[], ExpertWeights]) -> None:
        """Add the gradients since the last call to ``main_grad`` of each parameter, then free them and the copies.

        Raises RuntimeError if a forward waits for its backward, a weight has changed, or the stream is another;
        ValueError if a ``main_grad`` does not fit. Nothing is added then.
        """
        if self._waiting:
            raise RuntimeError(
                f"step() must come after the backward of every forward; {len(self._waiting)} forward passes still wait "
                "for theirs. Run them first. A forward without backward belongs under torch.no_grad(), or must be "
                "forgotten: delete its output, or call discard()."
            )
        parameters = look_up()
        self._check_unchanged(parameters)
        if self._buffers:
            self._check_place("step()", _place(next(iter(self._buffers.values())).device))
            self._flush(parameters)
        self.discard()

    def discard(self) -> None:
        """Forget the gradients since the last step() and the copies of the weights. Forward passes that still wait lose
        their backward.
        """
        for copies in self._copies:
            copies.free()
        self._copies, self._buffers, self._waiting = [], {}, weakref.WeakSet()
        self._step += 1

    def _before_backward(self, begun: _Pass) -> None:
        """Runs when the gradient of the output is known, ahead of the backward of the experts."""
        if begun.step != self._step:
            raise RuntimeError(
                "backward must come before step() or discard() of its own step; this one belongs to a forward "
                f"{self._step - begun.step} of them ago, and its weights are gone. Run forward again, or call step() "
                "after the last backward."
            )
        copies = begun.copies
        self._check_unchanged()
        place = _place(copies.w1.device)
        if self._buffers:
            self._check_place("backward", place)
        else:
            self._buffers_place = place
            self._buffers = copies.new_buffers()
        copies.accumulate_into(self._buffers)
        self._waiting.discard(begun)

    @torch.no_grad()
    def _flush(self, parameters: ExpertWeights) -> None:
        mains, sums, replaced = [], [], []
        for which, buffer in self._buffers.items():
            for e, (p, dw) in enumerate(zip(parameters[which], buffer.unbind(), strict=True)):
                if p.requires_grad:
                    mains.append(_main_grad(which, e, p))
                    if overwrites(p):
                        replaced.append(mains[-1])
                    sums.append(dw.T if self._transposed else dw)
        for main in replaced:
            main.zero_()
        add_each(mains, sums)

    def _before_optimizer(self, optimizer: Optimizer) -> None:
        if not self._copies:
            return
        if not self._under_way():
            self.discard()
            return
        ours = {id(p) for parameters in self._copies[0].parameters.values() for p in parameters}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"step() of the {self._owner} must come before {type(optimizer).__name__}.step(): main_grad lacks its "
                f"gradients ({self._what_waits()}). Call its step(), or discard() to forget them."
            )
        warnings.warn(
            f"{type(optimizer).__name__}.step() runs while gradients wait in a {self._owner}. If it updates these "
            "experts (through master weights), call step() of that one before it: their main_grad lacks them.",
            stacklevel=2,
        )
        for copies in self._copies:
            copies.use = None  # the next forward copies anew

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, parameters: ExpertWeights) -> None:
        """TypeError or ValueError unless all have the shapes of the store and one floating dtype and device."""
        first = parameters["w1"][0]
        for which, (rows, columns) in self._shapes.items():
            shape = (columns, rows) if self._transposed else (rows, columns)
            for e, p in enumerate(parameters[which]):
                name = name_of(which, e)
                checks.floating(name, p)
                if p.shape != shape:
                    raise ValueError(
                        f"{name} must have shape {shape} ({self._sizes}, transposed={self._transposed}); got "
                        f"{checks.describe(p)}. Weights stored the other way round need transposed="
                        f"{not self._transposed}."
                    )
                checks.same_dtype(name, p, "w1 of experts[0]", first)
                checks.same_device(name, p, "w1 of experts[0]", first)

    def _under_way(self) -> bool:
        return bool(self._waiting or self._buffers)

    def _what_waits(self) -> str:
        flushed = "some" if self._buffers else "no"
        return f"{len(self._waiting)} forward passes without backward, {flushed} gradients not flushed"

    def _check_unchanged(self, parameters: ExpertWeights | None = None) -> None:
        if not self._under_way():
            return
        changed = self._copies[0].changed(parameters)
        if changed:
            raise RuntimeError(
                f"weights must stay as they are from the first forward of a step to step(); {name_of(*changed[0])} "
                f"has changed while gradients are under way ({self._what_waits()}). Call step() after the last "
                "backward and before the optimizer or load_state_dict, or discard() to forget these gradients."
            )

    def _check_place(self, what: str, place: _Place) -> None:
        if place != self._buffers_place:
            raise RuntimeError(
                f"{what} must run on the CUDA stream of the other backward passes of its step, and in the same graph "
                f"capture, if any; got (stream, capturing) {place} after {self._buffers_place}. Capture all of a step, "
                "from its first forward to step(), or none of it."
            )


class _Pass:
    """One forward that autograd recorded; lives as long as its graph."""

    def __init__(self, copies: StackedExperts, step: int) -> None:
        self.copies, self.step = copies, step


class StackedExperts:
    """The weights of all experts in the layout of the kernels, as they were at one moment. Nobody writes to them.

    ``w1`` (E, N1, H) and ``w2`` (E, H, I) are leaves: the kernels look for ``main_grad`` on them
    (``training/main_grad.py``). ``fp8`` is the cache of their FP8 copies.
    """

    def __init__(
        self, parameters: ExpertWeights, shapes: dict[str, tuple[int, int]], transposed: bool, use: _Use
    ) -> None:
        self.parameters = parameters
        self.use: _Use | None = use
        self.only_fp8_is_read = isinstance(use.recipe, Fp8Recipe) and use.recipe.keep_transposed
        """After the first forward, which makes the FP8 copies and keeps them for backward."""
        self._signs = {which: _signs(ps) for which, ps in parameters.items()}
        self._storages = [p.untyped_storage() for ps in parameters.values() for p in ps]
        """Kept, so that no other tensor gets the address that is one of the signs."""
        self.fp8 = _Fp8Copies()
        self.w1, self.w2 = (_stacked(parameters[which], shapes[which], transposed, use.dtype) for which in ("w1", "w2"))

    def changed(self, parameters: ExpertWeights | None) -> list[tuple[str, int]]:
        """Which weights, and of which expert, are no longer what was copied: looked up by the caller, or the same
        parameters as then.
        """
        now = {which: _signs(ps) for which, ps in (parameters or self.parameters).items()}
        if now == self._signs:
            return []
        return [
            (which, e)
            for which, signs in now.items()
            for e in range(len(signs[0]))
            if any(new[e] != old[e] for new, old in zip(signs, self._signs[which], strict=True))
        ]

    def new_buffers(self) -> dict[str, Tensor]:
        """Zeros for the gradients of the weights that want one, in fp32, or fp64 for fp64 weights."""
        return {
            which: torch.zeros(w.shape, dtype=gradient_dtype(w), device=w.device)
            for which, w in (("w1", self.w1), ("w2", self.w2))
            if w.requires_grad
        }

    def accumulate_into(self, buffers: dict[str, Tensor]) -> None:
        """The backward passes that begin now add to ``buffers``."""
        self.w1.main_grad, self.w2.main_grad = buffers.get("w1"), buffers.get("w2")  # type: ignore[attr-defined]

    def free_stacked(self) -> None:
        """Give the memory of w1 and w2 back; graphs hold on to the tensors, for instance through a loss that is kept.
        Where the FP8 copies are kept for backward, nothing reads w1 and w2 any more.
        """
        for w in (self.w1, self.w2):
            w.untyped_storage().resize_(0)

    def free(self) -> None:
        self.free_stacked()
        self.fp8.invalidate()
        self.accumulate_into({})


class _Fp8Copies(WeightCache):
    """The FP8 copies of stacked weights. These never change, so the copies need no signs and live as long as they."""

    def __init__(self) -> None:
        super().__init__()
        self._quantized: list[Fp8Weight] = []

    def invalidate(self) -> None:
        self._quantized = []

    def get(self, weights: Sequence[Tensor], options: tuple[object, ...], quantize: Quantize) -> list[Fp8Weight]:
        if not self._quantized:
            self._quantized = quantize(range(len(weights)))
        return self._quantized


_requires_grad = operator.attrgetter("requires_grad")


def _signs(parameters: list[Tensor]) -> tuple[list[Any], ...]:
    """What shows that the copies are out of date."""
    return *signs_of(parameters), list(map(_requires_grad, parameters))


@torch.no_grad()
def _stacked(parameters: list[Tensor], shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> Tensor:
    w = torch.empty(len(parameters), *shape, dtype=dtype, device=parameters[0].device)
    copy_each(list(w.unbind()), [p.T if transposed else p for p in parameters])
    w.in_every_pass = True  # type: ignore[attr-defined]  # nobody but the store can ask for its gradient
    return w.requires_grad_(any(p.requires_grad for p in parameters))


def _main_grad(which: str, expert: int, p: Tensor) -> Tensor:
    main = main_grad_of(p)
    if not fits(main, p):
        raise ValueError(
            f"step() needs main_grad of {name_of(which, expert)} to be a "
            f"{str(gradient_dtype(p)).removeprefix('torch.')} tensor of shape {tuple(p.shape)} on {p.device}; got "
            f"{checks.describe(main)}. Set it on the parameter itself before step(), e.g. to torch.zeros_like(p, "
            "dtype=torch.float32); no gradient is lost, call step() again."
        )
    return main


def _place(device: torch.device) -> _Place:
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _watch_optimizers(store: weakref.ref[ExpertStore]) -> Callable[[], None]:
    """Tell ``store``, as long as it exists, of each step of a ``torch.optim`` optimizer; returns what ends that."""

    def before(optimizer: Optimizer, *_: Any) -> None:
        alive = store()
        if alive is not None:
            alive._before_optimizer(optimizer)

    return register_optimizer_step_pre_hook(before).remove
