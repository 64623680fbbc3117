"""The experts of one layer as pipeline-parallel trainers use them: rows in, rows out, weight gradients aside.

Such a trainer (Megatron's interleaved 1F1B, DeepSeek's DualPipe) has several micro-batches and layers under way at once
and keeps every expert as a module of its own, with an fp32 ``main_grad`` on each weight. The kernels want all experts
in one tensor. A :class:`SonicMoEMlpNode` stands between the two:

    first forward of a step    w1 (E, N1, H) and w2 (E, H, I) are copied from the experts, and quantized for FP8
    every forward              out = experts(rows that a DeepEP dispatch received); dx and d(probs) through autograd
    every backward             dW1, dW2 are added to fp32 buffers (E, N1, H) and (E, H, I), allocated by the first one;
                               on sm_90 the GEMM itself adds
    step()                     adds the buffers to each expert's ``main_grad`` and frees buffers and copies
    gradient reduction, clipping, optimizer.step()

``training/expert_store.py`` says what this costs, which weights a pass sees, and what may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from supersonic_moe import checks
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation, as_layout
from supersonic_moe.config.recipe import Recipe, as_recipe
from supersonic_moe.functional import experts_from_plan
from supersonic_moe.private_api import uncompiled
from supersonic_moe.routing.plan import plan_from_deepep
from supersonic_moe.training.expert_store import ExpertStore, ExpertWeights, name_of

_PROJECTIONS = (("linear_fc1", "linear_fc2"), ("up_gate_proj", "down_proj"), ("w1", "w2"))
"""What modules call their projections: Megatron, PaddleFleet, and everybody else."""


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
        checks.positive_sizes(
            n_experts=n_experts, hidden_size=hidden_size, intermediate_size=intermediate_size, tile=tile
        )
        checks.flag("transposed", transposed)
        checks.flag("validate", validate)
        if not isinstance(experts, (Sequence, nn.ModuleList)):
            raise TypeError(
                "experts must be a sequence of modules or of pairs of weights, or a torch.nn.ModuleList; got "
                f"{checks.describe(experts)}. Put them in a list."
            )
        self.experts, self.n_experts, self.hidden_size = experts, n_experts, hidden_size
        self.intermediate_size, self.transposed, self.tile = intermediate_size, transposed, tile
        self.activation, self.layout, self.recipe = as_activation(activation), as_layout(layout), as_recipe(recipe)
        self.backend, self.validate = backend, validate
        self._store = ExpertStore(type(self).__name__, hidden_size, intermediate_size, self.activation, transposed)
        self._store.check(self._weights())

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start a step of their own."""
        options = ("activation", "layout", "recipe", "transposed", "tile", "backend", "validate")
        sizes = (self.experts, self.n_experts, self.hidden_size, self.intermediate_size)
        return _rebuild, (sizes, {name: getattr(self, name) for name in options})

    @uncompiled  # bookkeeping on the host, which a graph would freeze
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
        if not isinstance(tokens_per_expert, Sequence):  # the plan looks at what is in one
            checks.counts("tokens_per_expert", tokens_per_expert)
        checks.size("tokens_per_expert", "length", len(tokens_per_expert), self.n_experts, "n_experts of the node")
        plan, scores_S = plan_from_deepep(
            dispatched_indices_NK, dispatched_probs_NK, tokens_per_expert, tile=self.tile, validate=self.validate
        )
        if self.validate:
            checks.finite_scores("dispatched_probs", scores_S)
        copies = self._store.copies(self._weights, x_NH.device, self.recipe)
        out_NH = experts_from_plan(
            x_NH,
            scores_S,
            plan,
            copies.w1,
            copies.w2,
            activation=self.activation,
            layout=self.layout,
            recipe=self.recipe,
            weight_cache=copies.fp8,
            accumulate_into_main_grad=True,
            backend=self.backend,
        )
        self._store.after_forward(copies, out_NH)
        return out_NH

    def step(self) -> None:
        """Add the gradients since the last call to each expert's ``main_grad``, then free them and the copies of the
        weights. Before anything reads ``main_grad``: reduction, clipping, the optimizer.

        Raises RuntimeError if a forward still waits for its backward or a weight has changed, and ValueError if a
        ``main_grad`` is missing or does not fit; nothing is added then.
        """
        self._store.step(self._weights)

    def discard(self) -> None:
        """Forget the gradients since the last step() and the copies of the weights, for instance after a loss that is
        not finite. Forward passes that still wait lose their backward.
        """
        self._store.discard()

    def _weights(self) -> ExpertWeights:
        """Looked up anew, because a module may have got a new parameter object."""
        checks.size("experts", "length", len(self.experts), self.n_experts, "n_experts")
        pairs = [_pair(e, expert) for e, expert in enumerate(self.experts)]
        return {"w1": [w1 for w1, _ in pairs], "w2": [w2 for _, w2 in pairs]}


def _pair(index: int, expert: object) -> tuple[Tensor, Tensor]:
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
    return _weight("w1", index, first), _weight("w2", index, second)


def _weight(which: str, expert: int, projection: Any) -> Tensor:
    if isinstance(projection, Tensor):
        return projection
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name_of(which, expert)} must be a tensor, or a module with a weight; got {checks.describe(projection)}."
        )
    if isinstance(bias, Tensor) and bias.numel():
        raise ValueError(
            f"{name_of(which, expert)} must have no bias; got {checks.describe(bias)}. Build the experts without "
            "(bias=False, add_bias_linear=False), or use experts_from_plan, which takes b1 and b2."
        )
    return weight


def _rebuild(arguments: tuple[Any, ...], options: dict[str, Any]) -> SonicMoEMlpNode:
    return SonicMoEMlpNode(*arguments, **options)
