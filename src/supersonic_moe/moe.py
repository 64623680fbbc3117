"""The Mixture-of-Experts module, a drop-in for SonicMoE's: same constructor, parameter names, layouts and call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from supersonic_moe import checks
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation, as_layout
from supersonic_moe.config.recipe import Fp8Recipe, Recipe, as_recipe
from supersonic_moe.config.router import SigmoidGroupedTopK, TokenRounding, TopKRouter, as_router, check_router
from supersonic_moe.functional import moe_layer
from supersonic_moe.private_api import member_of
from supersonic_moe.quantization.weight_cache import WeightCache
from supersonic_moe.routing.aux_loss import router_z_loss, switch_load_balancing_loss

if TYPE_CHECKING:
    from supersonic_moe.parallel.expert_parallel import ExpertParallel


class KernelBackendMoE(Enum):
    """Which kernels run the layer. ``auto`` is the best that the device and dtype allow; ``sonicmoe`` is its name in
    SonicMoE.
    """

    auto = "auto"
    sonicmoe = "auto"
    sm90 = "sm90"
    triton = "triton"
    torch = "reference"


def _backend(value: KernelBackendMoE) -> str:
    if not isinstance(value, KernelBackendMoE):
        choices = ", ".join(KernelBackendMoE.__members__)
        raise ValueError(f"unknown kernel_backend_moe {value!r}; choose one of {choices} of KernelBackendMoE.")
    return value.value


class Experts(nn.Module):
    """Weights of all experts for one projection: weight (E, out_features, in_features), bias (E, out_features). With
    ``first``, those of one rank: ``num_experts`` of them from expert ``first`` on, drawn from a sequence of their own.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        add_bias: bool,
        std: float,
        first: int | None = None,
    ) -> None:
        super().__init__()
        self.first = first
        self.num_experts, self.in_features, self.out_features, self.std = num_experts, in_features, out_features, std
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if add_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        generator = None
        if self.first is not None and not self.weight.is_meta:  # ranks are often seeded alike
            seed = int(torch.randint(2**62, ())) + self.first
            generator = torch.Generator(self.weight.device).manual_seed(seed)
        self.weight.normal_(0, self.std, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class MoE(nn.Module):
    """TopKRouter, experts and weighted sum.

    Args:
        num_experts: E. num_experts_per_tok: K, at most E.
        hidden_size: H. intermediate_size: I, per expert.
        activation_function: an :class:`ActivationType`, its name, or an :class:`Activation` with constants (gpt-oss,
            clamped SwiGLU).
        add_bias: biases on both projections, initialised to zero.
        std: standard deviation of the normal initialisation of all weights.
        router: a config of ``routing.topk`` or :class:`TokenRounding` (which rounds in training and routes by its base
            in evaluation), or a name.
        layout: how the 2I rows of ``c_fc.weight`` hold gate and up; ``"gate_up"`` is Hugging Face's ``gate_up_proj``.
        recipe: numeric recipe, a :class:`Bf16Recipe` or an :class:`Fp8Recipe`; None is the former. Also an attribute.
        z_loss_weight: adds this times the router z-loss to ``aux_loss``.
        accumulate_into_main_grad: add the gradients of ``c_fc.weight`` and ``c_proj.weight`` to their fp32
            ``main_grad``, not to ``.grad`` (Megatron's gradient accumulation fusion, ``training/main_grad.py``).
        validate: check device data too (NaN logits); costs a synchronisation a call.
        expert_parallel: a ``parallel.ExpertParallel`` of R ranks. Then the layer has E/R experts and the router of all;
            the router's weight must be the same on every rank, and ``expert_counts`` and ``aux_loss`` are of the
            tokens of this rank.

    Parameters: ``router.weight`` (E, H), ``c_fc.weight`` (E, 2I or I, H), ``c_fc.bias``, ``c_proj.weight`` (E, H, I),
    ``c_proj.bias``; with SigmoidGroupedTopK also the buffer ``correction_bias`` (E,) fp32, which balances load without
    a gradient (DeepSeek-V3 §2.1.2).
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: Activation | ActivationType | str,
        add_bias: bool,
        std: float,
        *,
        router: TopKRouter | TokenRounding | str = "softmax_after_topk",
        layout: GateUpLayout | str = GateUpLayout.INTERLEAVED,
        recipe: Recipe | None = None,
        z_loss_weight: float = 0.0,
        accumulate_into_main_grad: bool = False,
        validate: bool = False,
        expert_parallel: ExpertParallel | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_experts", num_experts),
            ("num_experts_per_tok", num_experts_per_tok),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ):
            checks.positive(name, value)
        checks.flag("add_bias", add_bias)
        checks.number("z_loss_weight", z_loss_weight, lowest=0)
        self.num_experts = num_experts
        self.top_k = num_experts_per_tok
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = as_activation(activation_function)
        self.routing = as_router(router)
        check_router(self.routing, num_experts, num_experts_per_tok)
        self.layout = as_layout(layout)
        self.recipe = as_recipe(recipe)
        self.weight_cache = WeightCache()
        self.z_loss_weight = z_loss_weight
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.validate = validate
        self.expert_parallel = expert_parallel
        experts_here, first = num_experts, None
        if expert_parallel is not None:
            expert_parallel.check_layer(num_experts, num_experts_per_tok, hidden_size, self.routing)
            experts_here = expert_parallel.experts_here
            first = expert_parallel.first_expert if expert_parallel.size > 1 else None

        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        nn.init.normal_(self.router.weight, 0, std)
        fan_out = self.activation.fan * intermediate_size
        self.c_fc = Experts(experts_here, hidden_size, fan_out, add_bias, std, first)
        self.c_proj = Experts(experts_here, intermediate_size, hidden_size, add_bias, std, first)
        base = self.routing.base if isinstance(self.routing, TokenRounding) else self.routing
        if isinstance(base, SigmoidGroupedTopK):
            self.register_buffer("correction_bias", torch.zeros(num_experts, dtype=torch.float32))
        else:
            self.correction_bias: Tensor | None = None
        self.expert_counts: Tensor | None = None
        """(E,) rows that each expert computed in the last forward; None before."""

    def forward(
        self,
        hidden_states: Tensor,
        kernel_backend_moe: KernelBackendMoE = KernelBackendMoE.auto,
        is_inference_mode: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``hidden_states`` (..., H) -> (output (..., H), aux_loss).

        ``aux_loss`` is the Switch load-balancing loss, unscaled, plus ``z_loss_weight`` times the z-loss; None when
        ``is_inference_mode``, which also saves nothing for backward. Without it nothing is saved either wherever
        autograd would not need it (``torch.no_grad``).
        """
        if not isinstance(hidden_states, Tensor) or hidden_states.dim() < 1:
            raise TypeError(
                f"hidden_states must be a tensor of shape (..., {self.hidden_size}); "
                f"got {checks.describe(hidden_states)}."
            )
        checks.size(
            "hidden_states", "last dimension", hidden_states.shape[-1], self.hidden_size, "hidden_size of the layer"
        )
        policy = self.routing
        rounding_step: Tensor | int = 0
        if isinstance(policy, TokenRounding):
            if not self.training or is_inference_mode:
                policy = policy.base
            elif policy.mode in ("SR-f", "NR-s"):
                # From torch's generator: fresh each step, the same when checkpointing recomputes, new at each replay.
                rounding_step = torch.randint(2**31, (1,), device=hidden_states.device)
        up, down = member_of(self, "c_fc"), member_of(self, "c_proj")
        flat = hidden_states.dim() == 2  # views cost the host two autograd nodes
        layer = moe_layer if self.expert_parallel is None else self.expert_parallel.moe_layer
        out_TH, logits_TE, counts_E = layer(
            hidden_states if flat else hidden_states.reshape(-1, self.hidden_size),
            member_of(member_of(self, "router"), "weight"),
            member_of(up, "weight"),
            member_of(down, "weight"),
            self.top_k,
            b1=member_of(up, "bias"),
            b2=member_of(down, "bias"),
            router=policy,
            correction_bias=self.correction_bias,
            rounding_step=rounding_step,
            activation=self.activation,
            layout=self.layout,
            recipe=self.recipe,
            weight_cache=self.weight_cache,
            inference=is_inference_mode,
            accumulate_into_main_grad=self.accumulate_into_main_grad,
            backend=_backend(kernel_backend_moe),
            validate=self.validate,
        )
        self.__dict__["expert_counts"] = counts_E  # ``self.expert_counts =`` would search all parameters first
        output = out_TH if flat else out_TH.view(hidden_states.shape)
        if is_inference_mode:
            return output, None
        aux_loss = switch_load_balancing_loss(logits_TE, counts_E, router=policy)
        if self.z_loss_weight:
            aux_loss = aux_loss + self.z_loss_weight * router_z_loss(logits_TE)
        return output, aux_loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """``.to(torch.bfloat16)`` leaves the correction bias in fp32: its updates of 1e-3 would round away."""
        before = self.correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.correction_bias
        if before is not None and after is not None and after.dtype is not before.dtype:
            self.correction_bias = after.to(before.dtype) if before.is_meta else before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, num_experts_per_tok={self.top_k}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation.type.value}, "
            f"layout={self.layout.value}"
        )


@contextmanager
def fp8_training(model: nn.Module, recipe: Fp8Recipe | None = None) -> Iterator[None]:
    """Every :class:`MoE` of ``model`` computes with ``recipe``, by default ``Fp8Recipe()``, inside the block; then each
    has its own recipe again. Backward may run outside: a pass ends in the recipe that its forward had.
    """
    recipe = Fp8Recipe() if recipe is None else recipe
    if not isinstance(recipe, Fp8Recipe):
        raise TypeError(f"fp8_training needs an Fp8Recipe; got {type(recipe).__name__} ({recipe!r}).")
    before = [(layer, layer.recipe) for layer in _layers(model, "fp8_training")]
    try:
        for layer, _ in before:
            layer.recipe = recipe
        yield
    finally:
        for layer, own in before:
            layer.recipe = own


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """No expert weight of ``model`` changes inside the block, so that FP8 layers quantise each once: the micro-batches
    of one optimizer step, or an evaluation. See ``quantization/weight_cache.py`` for what is noticed nevertheless.
    """
    with ExitStack() as held:
        for layer in _layers(model, "constant_weights"):
            held.enter_context(layer.weight_cache.hold())
        yield


def _layers(model: nn.Module, what: str) -> list[MoE]:
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers:
        raise ValueError(f"{what} needs a model with at least one MoE layer; {type(model).__name__} has none.")
    return layers
