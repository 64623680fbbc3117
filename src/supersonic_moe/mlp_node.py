"""The experts of one layer as pipeline-parallel trainers use them: rows in, rows out, weight gradients aside.

Such a trainer (Megatron's interleaved 1F1B, DeepSeek's DualPipe) has several micro-batches and layers under way at once
and keeps every expert as a module of its own, with an fp32 ``main_grad`` on each weight. The kernels want all experts
in one tensor. A :class:`SonicMoEMlpNode` stands between the two:

    first forward of a step    w1 (E, N1, H) and w2 (E, H, I) are copied from the experts, and quantised for FP8
    every forward              out = experts(rows that a DeepEP dispatch received); dx and d(probs) through autograd
    every backward             dW1, dW2 are added to fp32 buffers (E, N1, H) and (E, H, I), allocated by the first one;
                               on sm_90 the GEMM itself adds
    step()                     adds the buffers to each expert's ``main_grad`` and frees buffers and copies
    gradient reduction, clipping, optimizer.step()

A node costs, in bytes for each weight and from the first forward to step(): 2 for the BF16 copy, or 2 for the FP8 one
(e4m3 and its transpose; BF16 is freed once they exist, unless ``keep_transposed=False`` needs it again), and 4 for the
buffers. Sums are taken in the order in which backward passes run, so the same order gives the same bits.

**Which weights are seen.** Those of the first forward of a step, by all its micro-batches. The weights must not change
while gradients are under way, which is while a forward waits for its backward or a buffer waits for step(). Every
forward, backward and step() compares all weights (versions, pointers, strides, ``requires_grad``) with what was copied,
and raises where one differs; step() also finds a parameter that was replaced by another. With nothing under way a
forward copies anew instead: after ``load_state_dict``, say, between evaluations. A ``torch.optim`` optimizer that holds
one of the weights is stopped before it changes them if gradients are under way; any other one makes the next forward
copy anew, with a warning.

Some changes show no sign (``quantization/weight_cache.py`` lists them): ``.data`` written in place by Megatron's
copy of master weights, fused optimizers outside ``torch.optim``, all-gathers. In a training loop they come after
step(), which drops the copies, so they are seen. Elsewhere call step() or discard() after them. The weights are read from the
parameters, not through the modules: what a forward hook of an expert module would do (Megatron's
``overlap_param_gather``) must be done before. And no autograd hook of the parameters runs (``overlap_grad_reduce``):
reduce after step().

**CUDA graphs.** All of a step, from its first forward to step(), may be captured in one graph, which then copies the
weights at each replay; a part of it may not, because buffers outlive the part. The host's checks run at capture only,
and ``tokens_per_expert`` on the host is baked in; on the device it is not. A step runs on one stream.
"""

from __future__ import annotations

import operator
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from supersonic_moe import checks
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation, as_layout
from supersonic_moe.config.recipe import Fp8Recipe, Recipe, as_recipe
from supersonic_moe.functional import experts_from_plan
from supersonic_moe.private_api import add_each, copy_each
from supersonic_moe.quantization.weight_cache import Fp8Weight, WeightCache
from supersonic_moe.routing.plan import plan_from_deepep

_PROJECTIONS = (("linear_fc1", "linear_fc2"), ("up_gate_proj", "down_proj"), ("w1", "w2"))
"""What modules call their projections: Megatron, PaddleFleet, and everybody else."""

_Place: TypeAlias = tuple[int, bool] | None
"""Where work is queued: (CUDA stream, whether a graph is being captured); None on a CPU."""
_Key: TypeAlias = tuple[torch.dtype, Recipe, _Place, bool]
"""What copies of the weights are good for: dtype of the computation, recipe, place, inference mode."""
_Weights: TypeAlias = dict[str, list[Tensor]]
"""The parameters of all experts, under "w1" and "w2"."""


class SonicMoEMlpNode:
    """The experts of one layer on rows that a DeepEP dispatch received. See the module docstring for the life of a
    step.

    Args:
        experts: one entry an expert, each a module with ``linear_fc1`` and ``linear_fc2``, ``up_gate_proj`` and
            ``down_proj``, or ``w1`` and ``w2`` (modules with a ``weight``, or tensors), or a pair of tensors. No bias.
            The first is (N1, H), N1 = 2I for gated activations, else I; the second (H, I).
        n_experts: E, those of this rank. hidden_size: H. intermediate_size: I, per expert.
        layout: how the 2I rows of the first projection hold gate and up. The default is that of Megatron and
            PaddleFleet, not of :class:`MoE`.
        transposed: weights are stored input by output, (H, N1) and (I, H), as PaddleFleet does.
        tile: pad each non-empty expert to a multiple of this many rows, with exactly zero gradient from padding.
        validate: check device data too (ids against ``tokens_per_expert``, finite probabilities); costs a
            synchronisation a call.

    Other arguments: ``functional.py``. The node owns no parameters and is no module: the optimizer and checkpoints see
    the experts alone. Parameters that require no gradient get none.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module | Sequence[Tensor]] | nn.ModuleList,
        n_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation | ActivationType | str = ActivationType.SWIGLU,
        layout: GateUpLayout | str = GateUpLayout.GATE_UP,
        recipe: Recipe | None = None,
        transposed: bool = False,
        tile: int = 1,
        backend: str = "auto",
        validate: bool = False,
    ) -> None:
        sizes = {"n_experts": n_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, value in (sizes | {"tile": tile}).items():
            checks.positive(name, value)
        self.experts, self.n_experts, self.hidden_size = experts, n_experts, hidden_size
        self.intermediate_size, self.transposed, self.tile = intermediate_size, transposed, tile
        self.activation, self.layout, self.recipe = as_activation(activation), as_layout(layout), as_recipe(recipe)
        self.backend, self.validate = backend, validate
        self._shapes = {
            "w1": (self.activation.fan * intermediate_size, hidden_size),
            "w2": (hidden_size, intermediate_size),
        }
        self._step = 0
        self._stacks: list[_Stack] = []
        """Copies of the weights that this step has read: one, or one for each stream, dtype and recipe."""
        self._waiting: weakref.WeakSet[_Pass] = weakref.WeakSet()
        """Forward passes whose backward has not run, as long as their graphs exist."""
        self._buffers: dict[str, Tensor] = {}
        self._buffers_place: _Place = None
        self._check_shapes(self._parameters())
        weakref.finalize(self, _watch_optimizers(weakref.ref(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start a step of their own."""
        options = ("activation", "layout", "recipe", "transposed", "tile", "backend", "validate")
        sizes = (self.experts, self.n_experts, self.hidden_size, self.intermediate_size)
        return _rebuild, (sizes, {name: getattr(self, name) for name in options})

    # ---- one step ----------------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # bookkeeping on the host, which a graph would freeze
    def __call__(
        self,
        x_NH: Tensor,
        tokens_per_expert: Sequence[int] | Tensor,
        dispatched_indices_NK: Tensor,
        dispatched_probs_NK: Tensor,
    ) -> Tensor:
        """``out[n] = sum_j probs[n, j] * expert[indices[n, j]](x[n])``, (N, H): what the combine sends back.

        Args:
            x_NH: the rows received; N = 0 is fine.
            tokens_per_expert: (E,) rows of each expert, as DeepEP returns it: on the host it sizes buffers exactly.
            dispatched_indices_NK: local expert ids, -1 where the choice went to another rank.
            dispatched_probs_NK: their probabilities; get a gradient, exactly 0 at masked entries.
        """
        checks.tensor("x", x_NH, 2, "(N, H)")
        checks.size("x", "hidden size (last dimension)", x_NH.shape[1], self.hidden_size, "hidden_size of the node")
        checks.ids("dispatched_indices", dispatched_indices_NK, 2)
        rows, received = dispatched_indices_NK.shape[0], x_NH.shape[0]
        checks.size("dispatched_indices", "one row for each row of x,", rows, received, "the rows received")
        counted = len(tokens_per_expert)
        checks.size("tokens_per_expert", "length", counted, self.n_experts, "n_experts of the node")
        plan, scores_S = plan_from_deepep(
            dispatched_indices_NK, dispatched_probs_NK, tokens_per_expert, tile=self.tile, validate=self.validate
        )
        if self.validate:
            checks.finite_scores("dispatched_probs", scores_S)
        stack = self._current_stack(x_NH.device)
        out_NH = experts_from_plan(
            x_NH,
            scores_S,
            plan,
            stack.w1,
            stack.w2,
            activation=self.activation,
            layout=self.layout,
            recipe=self.recipe,
            weight_cache=stack.fp8,
            accumulate_into_main_grad=True,
            backend=self.backend,
        )
        if isinstance(self.recipe, Fp8Recipe) and self.recipe.keep_transposed:
            stack.free_stacked()  # from here on only the FP8 copies are read
        if out_NH.requires_grad:
            begun = _Pass(stack, self._step)
            self._waiting.add(begun)
            out_NH.register_hook(lambda _: self._before_backward(begun))  # type: ignore[no-untyped-call]
        return out_NH

    def step(self) -> None:
        """Add the gradients since the last call to each expert's ``main_grad``, then free them and the copies of the
        weights. Before anything reads ``main_grad``: reduction, clipping, the optimizer.
        """
        if self._waiting:
            raise RuntimeError(
                f"step() must come after the backward of every forward; {len(self._waiting)} forward passes still wait "
                "for theirs. Run them first. A forward without backward belongs under torch.no_grad(), or must be "
                "forgotten: delete its output, or call discard()."
            )
        self._check_unchanged(self._parameters())
        if self._buffers:
            self._check_place("step()", _place(next(iter(self._buffers.values())).device))
            self._flush()
        self.discard()

    def discard(self) -> None:
        """Forget the gradients since the last step() and the copies of the weights, for instance after a loss that is
        not finite. Forward passes that still wait lose their backward.
        """
        for stack in self._stacks:
            stack.free()
        self._stacks, self._buffers, self._waiting = [], {}, weakref.WeakSet()
        self._step += 1

    @torch.no_grad()
    def _flush(self) -> None:
        mains, sums = [], []
        parameters = self._parameters()
        for which, buffer in self._buffers.items():
            for e, (p, dw) in enumerate(zip(parameters[which], buffer.unbind(), strict=True)):
                if p.requires_grad:
                    mains.append(_main_grad(self._name(which, e), p))
                    sums.append(dw.T if self.transposed else dw)
        add_each(mains, sums)

    def _before_backward(self, begun: _Pass) -> None:
        """Runs when the gradient of the output is known, ahead of the backward of the experts."""
        if begun.step != self._step:
            raise RuntimeError(
                "backward must come before step() or discard() of its own step; this one belongs to a forward "
                f"{self._step - begun.step} of them ago, and its weights are gone. Run forward again, or call step() "
                "after the last backward."
            )
        stack = begun.stack
        self._check_unchanged()
        place = _place(stack.w1.device)
        if self._buffers:
            self._check_place("backward", place)
        else:
            self._buffers_place = place
            self._buffers = stack.new_buffers()
        stack.lend(self._buffers)
        self._waiting.discard(begun)

    # ---- weights -----------------------------------------------------------------------------------------------------

    def _current_stack(self, device: torch.device) -> _Stack:
        """Copies of the weights as they are now, for the stream and the dtype of this call."""
        if self._waiting or self._buffers:
            self._check_unchanged()
            parameters = self._stacks[0].parameters
        else:
            parameters = self._parameters()
            if self._stacks and self._stacks[0].changed(parameters):
                self.discard()
        dtype = parameters["w1"][0].dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        key: _Key = (dtype, self.recipe, _place(device), torch.is_inference_mode_enabled())
        for stack in self._stacks:
            if stack.key == key:
                return stack
        self._check_shapes(parameters)
        self._stacks.append(_Stack(parameters, self._shapes, self.transposed, key))
        return self._stacks[-1]

    def _parameters(self) -> _Weights:
        """Looked up anew, because a module may have got a new parameter object; in the middle of a step it costs too
        much, and step() looks.
        """
        checks.size("experts", "length", len(self.experts), self.n_experts, "n_experts")
        pairs = [_weights_of(e, expert) for e, expert in enumerate(self.experts)]
        return {"w1": [w1 for w1, _ in pairs], "w2": [w2 for _, w2 in pairs]}

    def _name(self, which: str, expert: int) -> str:
        return f"{which} of experts[{expert}]"

    def _check_shapes(self, parameters: _Weights) -> None:
        first = parameters["w1"][0]
        for which, (rows, columns) in self._shapes.items():
            shape = (columns, rows) if self.transposed else (rows, columns)
            for e, p in enumerate(parameters[which]):
                name = self._name(which, e)
                checks.floating(name, p)
                if p.shape != shape:
                    raise ValueError(
                        f"{name} must have shape {shape} (hidden_size {self.hidden_size}, intermediate_size "
                        f"{self.intermediate_size}, {self.activation.type.value}, transposed={self.transposed}); got "
                        f"{checks.describe(p)}. Weights stored the other way round need transposed="
                        f"{not self.transposed}."
                    )
                checks.same_dtype(name, p, "w1 of experts[0]", first)
                checks.same_device(name, p, "w1 of experts[0]", first)

    def _check_unchanged(self, parameters: _Weights | None = None) -> None:
        if not (self._waiting or self._buffers):
            return
        changed = self._stacks[0].changed(parameters)
        if changed:
            raise RuntimeError(
                f"weights must stay as they are from the first forward of a step to step(); {self._name(*changed[0])} "
                f"has changed while gradients are under way ({len(self._waiting)} forward passes without backward, "
                f"{'some' if self._buffers else 'no'} gradients not flushed). Call step() after the last backward and "
                "before the optimizer or load_state_dict, or discard() to forget these gradients."
            )

    def _check_place(self, what: str, place: _Place) -> None:
        if place != self._buffers_place:
            raise RuntimeError(
                f"{what} must run on the CUDA stream of the other backward passes of its step, and in the same graph "
                f"capture, if any; got (stream, capturing) {place} after {self._buffers_place}. Capture all of a step, "
                "from its first forward to step(), or none of it."
            )

    def _before_optimizer(self, optimizer: Optimizer) -> None:
        if not self._stacks:
            return
        if not (self._waiting or self._buffers):
            self.discard()
            return
        ours = {id(p) for parameters in self._stacks[0].parameters.values() for p in parameters}
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"step() of the SonicMoEMlpNode must come before {type(optimizer).__name__}.step(): main_grad lacks "
                f"its gradients ({len(self._waiting)} forward passes without backward, "
                f"{'some' if self._buffers else 'no'} gradients not flushed). Call node.step(), or node.discard() to "
                "forget them."
            )
        warnings.warn(
            f"{type(optimizer).__name__}.step() runs while gradients wait in a SonicMoEMlpNode. If it updates these "
            "experts (through master weights), call node.step() before it: their main_grad lacks them.",
            stacklevel=2,
        )
        for stack in self._stacks:
            stack.key = None  # the next forward copies anew


class _Pass:
    """One forward that autograd recorded; lives as long as its graph."""

    def __init__(self, stack: _Stack, step: int) -> None:
        self.stack, self.step = stack, step


class _Stack:
    """The weights of all experts in the layout of the kernels, as they were at one moment. Nobody writes to them.

    ``w1`` and ``w2`` are leaves: the kernels look for ``main_grad`` on them (``training/main_grad.py``).
    """

    def __init__(self, parameters: _Weights, shapes: dict[str, tuple[int, int]], transposed: bool, key: _Key) -> None:
        self.parameters = parameters
        self.key: _Key | None = key
        self._signs = {which: _signs(ps) for which, ps in parameters.items()}
        self.fp8 = _Copies()
        self.w1, self.w2 = (_stacked(parameters[which], shapes[which], transposed, key[0]) for which in ("w1", "w2"))

    def changed(self, parameters: _Weights | None = None) -> list[tuple[str, int]]:
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
            which: torch.zeros(w.shape, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
            for which, w in (("w1", self.w1), ("w2", self.w2))
            if w.requires_grad
        }

    def lend(self, buffers: dict[str, Tensor]) -> None:
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
        self.lend({})


class _Copies(WeightCache):
    """The FP8 copies of a stack. It never changes, so they need no signs and live as long as it does."""

    def __init__(self) -> None:
        super().__init__()
        self._quantized: list[Fp8Weight] = []

    def invalidate(self) -> None:
        self._quantized = []

    def get(
        self,
        weights: Sequence[Tensor],
        options: tuple[object, ...],
        quantize: Callable[[Sequence[int]], list[Fp8Weight]],
    ) -> list[Fp8Weight]:
        if not self._quantized:
            self._quantized = quantize(range(len(weights)))
        return self._quantized


# ---- one weight ------------------------------------------------------------------------------------------------------


def _weights_of(index: int, expert: object) -> tuple[Tensor, Tensor]:
    """The two weights of an expert, in any of the forms that the class accepts."""
    if isinstance(expert, list | tuple) and len(expert) == 2:
        first, second = expert
    else:
        found = [pair for pair in _PROJECTIONS if all(hasattr(expert, name) for name in pair)]
        if not found:
            pairs = ", ".join(" and ".join(pair) for pair in _PROJECTIONS)
            raise TypeError(
                f"experts[{index}] must be a pair of tensors or have {pairs}; got {type(expert).__name__}. "
                "Pass [(w1, w2), ...], the weights of each expert."
            )
        first, second = (getattr(expert, name) for name in found[0])
    return _weight_of(f"w1 of experts[{index}]", first), _weight_of(f"w2 of experts[{index}]", second)


def _weight_of(name: str, projection: Any) -> Tensor:
    if isinstance(projection, Tensor):
        return projection
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, or a module with a weight; got {checks.describe(projection)}.")
    if isinstance(bias, Tensor) and bias.numel():
        raise ValueError(
            f"{name} must have no bias; got {checks.describe(bias)}. Build the experts without (bias=False, "
            "add_bias_linear=False), or use experts_from_plan, which takes b1 and b2."
        )
    return weight


def _signs(parameters: list[Tensor]) -> tuple[list[Any], ...]:
    """What shows that a weight has changed, one list a sign: maps without Python code, for they run in each pass."""
    each = (Tensor.data_ptr, Tensor.stride, _ATTRIBUTES)
    return tuple(list(map(sign, parameters)) for sign in each)


_ATTRIBUTES = operator.attrgetter("_version", "requires_grad")


@torch.no_grad()
def _stacked(parameters: list[Tensor], shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> Tensor:
    w = torch.empty(len(parameters), *shape, dtype=dtype, device=parameters[0].device)
    copy_each(list(w.unbind()), [p.T if transposed else p for p in parameters])
    return w.requires_grad_(any(p.requires_grad for p in parameters))


def _main_grad(name: str, p: Tensor) -> Tensor:
    main, dtype = getattr(p, "main_grad", None), torch.promote_types(p.dtype, torch.float32)
    if not isinstance(main, Tensor) or (main.dtype, main.shape, main.device) != (dtype, p.shape, p.device):
        raise ValueError(
            f"step() needs main_grad of {name} to be a {str(dtype).removeprefix('torch.')} tensor of shape "
            f"{tuple(p.shape)} on {p.device}; got {checks.describe(main)}. Set it on the parameter itself before "
            "step(), e.g. to torch.zeros_like(p, dtype=torch.float32); no gradient is lost, call step() again."
        )
    return main


def _place(device: torch.device) -> _Place:
    if device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _watch_optimizers(node: weakref.ref[SonicMoEMlpNode]) -> Callable[[], None]:
    """Tell ``node``, as long as it exists, of each step of a ``torch.optim`` optimizer; returns what ends that."""

    def before(optimizer: Optimizer, *_: Any) -> None:
        alive = node()
        if alive is not None:
            alive._before_optimizer(optimizer)

    return register_optimizer_step_pre_hook(before).remove


def _rebuild(arguments: tuple[Any, ...], options: dict[str, Any]) -> SonicMoEMlpNode:
    return SonicMoEMlpNode(*arguments, **options)
