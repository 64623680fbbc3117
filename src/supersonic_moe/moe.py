"""The Mixture-of-Experts module, a drop-in for SonicMoE's: same constructor, parameter names, layouts and call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from supersonic_moe import checks
from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation, as_layout
from supersonic_moe.config.recipe import Bf16Recipe, Fp8Recipe, Recipe, as_recipe
from supersonic_moe.config.router import SigmoidGroupedTopK, TokenRounding, TopKRouter, as_router, check_router
from supersonic_moe.functional import RouterWeight, Selection, run_layer
from supersonic_moe.parts import Experts, RankExperts, Router, is_plain_linear, reset, weights_of
from supersonic_moe.private_api import exporting, in_backward, member_of, transforms_active
from supersonic_moe.quantization.weight_cache import WeightCache
from supersonic_moe.routing.aux_loss import router_z_loss, switch_load_balancing_loss
from supersonic_moe.routing.counts import add_counts, keep_counts, move_biases
from supersonic_moe.training.recompute import LastForward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from supersonic_moe.parallel.expert_parallel import ExpertParallel


_DEFAULT = Bf16Recipe()


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
        choices = ", ".join(f"KernelBackendMoE.{name}" for name in KernelBackendMoE.__members__)
        raise ValueError(f"unknown kernel_backend_moe {value!r}; choose one of {choices}.")
    return value.value


class RouterOutput(NamedTuple):
    """What auxiliary losses of your own are made of (``routing/aux_loss.py``)."""

    router_logits: Tensor
    """(T, E), differentiable."""
    expert_ids: Tensor | None
    """(T, K) int32 experts of each token, -1 where it is padding; None with token rounding."""
    expert_counts: Tensor
    """(E,) int32 rows that each expert computed."""


class MoE(nn.Module):
    """Router, experts and weighted sum.

    Args:
        num_experts: E. num_experts_per_tok: K, at most E.
        hidden_size: H. intermediate_size: I, per expert.
        activation_function: an :class:`ActivationType`, its name, or an :class:`Activation` with constants (gpt-oss,
            clamped SwiGLU).
        add_bias: biases on both projections, initialised to zero.
        std: standard deviation of the normal initialisation of all weights.
        router: a config of ``config.router`` or :class:`TokenRounding` (which rounds in training and routes by its base
            in evaluation), or a name.
        layout: how the 2I rows of ``c_fc.weight`` hold gate and up; ``"gate_up"`` is Hugging Face's ``gate_up_proj``.
        recipe: numeric recipe, a :class:`Bf16Recipe` or an :class:`Fp8Recipe`; None is the former. Also an attribute.
        z_loss_weight: adds this times the router z-loss to ``aux_loss``.
        accumulate_into_main_grad: add the gradients of ``c_fc.weight`` and ``c_proj.weight`` to their fp32
            ``main_grad``, not to ``.grad`` (Megatron's gradient accumulation fusion, ``training/main_grad.py``).
        validate: check device data too (NaN logits); costs a synchronisation a call.
        router_dtype: compute the logits in this dtype (torch.float32, torch.float64) whatever that of the experts, also
            under autocast. A ``router`` of another class must return its logits in it.
        device, dtype: of the parameters, as in any module of torch.
        expert_parallel: a ``parallel.ExpertParallel`` of R ranks. Then the layer has E/R experts and the router of all;
            the router must be the same on every rank, and counts and ``aux_loss`` are of the tokens of this rank.

    Parameters: ``router.weight`` (E, H), ``c_fc.weight`` (E, 2I or I, H), ``c_fc.bias``, ``c_proj.weight`` (E, H, I),
    ``c_proj.bias``; with SigmoidGroupedTopK also the buffer ``correction_bias`` (E,), which balances load without a
    gradient (DeepSeek-V3 §2.1.2) and stays fp32, see :func:`update_correction_bias`.

    ``router``, ``c_fc`` and ``c_proj`` are called as modules, so hooks, parametrizations and adapters on them work.
    ``router`` may be replaced by any module that maps x (T, H) to logits (T, E).
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
        router_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        expert_parallel: ExpertParallel | None = None,
    ) -> None:
        super().__init__()
        checks.positive_sizes(
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )
        checks.flag("add_bias", add_bias)
        checks.flag("accumulate_into_main_grad", accumulate_into_main_grad)
        checks.flag("validate", validate)
        checks.number("std", std, lowest=0)
        checks.number("z_loss_weight", z_loss_weight, lowest=0)
        for name, value in (("router_dtype", router_dtype), ("dtype", dtype)):
            if value is not None:
                checks.floating_dtype(name, value)
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
        self._last_forward = LastForward()
        self._before_blocks: list[list[Recipe]] = []
        """For each open block of ``fp8_training``, oldest first: the recipe that its end brings back."""
        self.z_loss_weight = z_loss_weight
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.router_dtype = router_dtype
        self.validate = validate
        self.expert_parallel = expert_parallel
        experts_here = num_experts
        experts: Callable[..., Experts] = Experts
        if expert_parallel is not None:
            from supersonic_moe.parallel.expert_parallel import ExpertParallel  # only those who have one need it

            if not isinstance(expert_parallel, ExpertParallel):
                raise TypeError(
                    f"expert_parallel must be a parallel.ExpertParallel; got {checks.short(expert_parallel)}. Make "
                    "one of the process group: ExpertParallel(group, num_experts=..., top_k=..., hidden=..., "
                    "max_tokens=...)."
                )
            expert_parallel.check_layer(num_experts, num_experts_per_tok, hidden_size, self.routing)
            experts_here = expert_parallel.experts_here
            if expert_parallel.size > 1:
                experts = partial(RankExperts, expert_parallel.first_expert, expert_parallel.others)

        self.router = Router(hidden_size, num_experts, std, router_dtype, device, dtype)
        fan_in = self.activation.fan * intermediate_size
        self.c_fc = experts(experts_here, hidden_size, fan_in, add_bias, std, device, dtype)
        self.c_proj = experts(experts_here, intermediate_size, hidden_size, add_bias, std, device, dtype)
        base = self.routing.base if isinstance(self.routing, TokenRounding) else self.routing
        # No buffers: DistributedDataParallel would overwrite the counts of every rank by those of the first.
        self.expert_counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
        """(E,) rows that each expert computed in the last forward outside of ``torch.func``; zeros before."""
        self.counts_since_update: Tensor | None = None
        """(E,) int64 rows of all forwards in training mode since the correction bias was moved; None without one."""
        if isinstance(base, SigmoidGroupedTopK):
            self.register_buffer("correction_bias", torch.zeros(num_experts, dtype=torch.float32, device=device))
            self.counts_since_update = torch.zeros(num_experts, dtype=torch.int64, device=device)
            self.register_load_state_dict_post_hook(_bias_in_fp32)  # type: ignore[no-untyped-call]
        else:
            self.correction_bias: Tensor | None = None
        if self.activation.gated:
            self.register_state_dict_post_hook(_say_layout)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """What the constructor does to parameters and buffers; after ``to_empty``, for instance."""
        for part in (self.router, self.c_fc, self.c_proj):
            reset(part)
        self.expert_counts.zero_()
        if self.correction_bias is not None and self.counts_since_update is not None:
            self.correction_bias.zero_()
            self.counts_since_update.zero_()

    def forward(
        self,
        hidden_states: Tensor,
        kernel_backend_moe: KernelBackendMoE = KernelBackendMoE.auto,
        is_inference_mode: bool = False,
        *,
        token_mask: Tensor | None = None,
        return_routing: bool = False,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, RouterOutput]:
        """``hidden_states`` (..., H) -> (output (..., H), aux_loss), and a :class:`RouterOutput` on request.

        ``aux_loss`` is the Switch load-balancing loss, unscaled, plus ``z_loss_weight`` times the z-loss; None when
        ``is_inference_mode``, which also saves nothing for backward. Without it nothing is saved either wherever
        autograd would not need it (``torch.no_grad``).

        Args:
            token_mask: (...) bool, False where a token is padding: such a token gets zeros, and is in neither the
                losses nor the counts.
            return_routing: return logits, expert ids and counts as well, for losses of your own.
        """
        try:
            if not isinstance(hidden_states, Tensor) or hidden_states.dim() < 1:
                raise TypeError(
                    f"hidden_states must be a tensor of shape (..., {self.hidden_size}); "
                    f"got {checks.describe(hidden_states)}."
                )
            checks.strided("hidden_states", hidden_states)
            if is_inference_mode is not True and is_inference_mode is not False:
                checks.flag("is_inference_mode", is_inference_mode)
            checks.size(
                "hidden_states", "last dimension", hidden_states.shape[-1], self.hidden_size, "hidden_size of the layer"
            )
            if token_mask is not None:
                checks.token_mask("token_mask", token_mask, hidden_states)
        except (TypeError, ValueError) as error:
            if self.expert_parallel is not None:
                self.expert_parallel.refuse_call(error)
            raise
        recipe, correction_bias, training = self.recipe or _DEFAULT, self.correction_bias, self.training
        router = member_of(self, "router")
        fused = is_plain_linear(router)
        if not torch.compiler.is_compiling():
            counts = not is_inference_mode and (training or torch.is_grad_enabled())
            evaluates = not (counts or is_inference_mode or torch.is_inference_mode_enabled())
            last = self._last_forward
            recipe, correction_bias, training = last.settings(recipe, correction_bias, training, counts, evaluates)
            if isinstance(router, nn.Linear):
                fused = last.fuses(fused, self.training, counts)
        policy = self.routing
        rounding_step: Tensor | int = 0
        if isinstance(policy, TokenRounding):
            if not training or is_inference_mode:
                policy = policy.base
            elif policy.mode in ("SR-f", "NR-s"):
                # From torch's generator: fresh each step, the same when checkpointing recomputes, new at each replay.
                rounding_step = torch.randint(2**31, (1,), device=hidden_states.device)
                if not torch.compiler.is_compiling():
                    rounding_step = self._last_forward.step(rounding_step)
        flat = hidden_states.dim() == 2  # views cost the host two autograd nodes
        x_TH = hidden_states if flat else hidden_states.reshape(-1, self.hidden_size)
        if token_mask is not None:
            token_mask = token_mask.reshape(-1)
        w1, b1 = weights_of(member_of(self, "c_fc"), "c_fc", x_TH)
        w2, b2 = weights_of(member_of(self, "c_proj"), "c_proj", x_TH)
        run = run_layer if self.expert_parallel is None else self.expert_parallel.run_layer
        out_TH, logits_TE, counts_E, ids_TK, balance_loss = run(
            x_TH,
            RouterWeight(member_of(router, "weight"), self.router_dtype) if fused else router,
            w1,
            w2,
            Selection(self.top_k, policy, correction_bias, rounding_step, token_mask, not is_inference_mode),
            {
                "b1": b1,
                "b2": b2,
                "activation": self.activation,
                "layout": self.layout,
                "recipe": recipe,
                "weight_cache": self.weight_cache,
                "inference": is_inference_mode,
                "accumulate_into_main_grad": self.accumulate_into_main_grad,
                "backend": _backend(kernel_backend_moe),
                "validate": self.validate,
            },
        )
        if self.router_dtype is not None and logits_TE.dtype is not self.router_dtype:
            raise TypeError(
                f"the router must return logits in router_dtype, {self.router_dtype}; got {checks.describe(logits_TE)} "
                f"from a {type(router).__name__}. Compute them in it, as supersonic_moe.Router(..., logits_dtype=...) "
                "does, or set moe.router_dtype = None."
            )
        self._count(counts_E, self.training and not is_inference_mode, return_routing or torch.is_grad_enabled())
        output = out_TH if flat else out_TH.view(hidden_states.shape)
        aux_loss = None
        if not is_inference_mode:
            aux_loss = balance_loss
            if aux_loss is None:
                aux_loss = switch_load_balancing_loss(logits_TE, counts_E, router=policy, token_mask_T=token_mask)
            if self.z_loss_weight:
                aux_loss = aux_loss + self.z_loss_weight * router_z_loss(logits_TE, token_mask_T=token_mask)
        if return_routing:
            return output, aux_loss, RouterOutput(logits_TE, ids_TK, counts_E)
        return output, aux_loss

    def _count(self, counts_E: Tensor, training: bool, shared: bool) -> None:
        """``shared``: autograd or the caller has the tensor, and a compiled forward writes into the one kept here."""
        if not torch.compiler.is_compiling() and transforms_active():  # whose tensors are of no use once it has ended
            return
        total_E = self.counts_since_update if training else None
        if total_E is not None and total_E.device != counts_E.device:  # parameters came one by one, not by ``_apply``
            total_E = self.counts_since_update = _moved(total_E, counts_E.device)
        if torch.compiler.is_compiling():
            if exporting():  # a program that changes what is no buffer cannot be saved, and nobody would read it
                return
            if self.expert_counts.device != counts_E.device:
                self.expert_counts = _moved(self.expert_counts, counts_E.device)
            keep_counts(self.expert_counts, total_E, counts_E)  # a graph may set no attribute inside a checkpoint
            return
        if torch.is_inference_mode_enabled():  # the tensors before are others', autograd's and callers'
            with torch.inference_mode(False):  # and no compiled graph can change those that inference mode makes
                counts_E = counts_E.clone()
        elif shared:
            counts_E = counts_E.clone()
        self.__dict__["expert_counts"] = counts_E  # ``self.expert_counts =`` would search all parameters first
        if total_E is not None:
            add_counts(total_E, counts_E)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        """``.to(torch.bfloat16)`` leaves the correction bias in fp32: its updates of 1e-3 would round away. The counts
        go along, and with the bias start at zero where there was no data (``to_empty`` from the meta device).
        """
        before = self.correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.correction_bias
        if before is not None and after is not None and (before.is_meta or after.dtype is not before.dtype):
            self.correction_bias = _moved(before, after.device)
        device = fn(self.expert_counts).device
        self.expert_counts = _moved(self.expert_counts, device)
        if self.counts_since_update is not None:
            self.counts_since_update = _moved(self.counts_since_update, device)
        return self

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        """Refuses rows of another layout, which have the same shape and would compute something else."""
        saved, own = metadata.get("layout"), as_layout(self.layout).value
        if saved not in (None, own):
            *_, errors = rest
            errors.append(
                f"{prefix}c_fc was saved by a layer with layout={saved!r}, and this one has layout={own!r}: gate and "
                f"up would be mixed up. Make the layer with layout={saved!r}; or, where rows have been put in order "
                "since, load dict(state_dict), which says nothing about them."
            )
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, num_experts_per_tok={self.top_k}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={as_activation(self.activation).type.value}, "
            f"layout={as_layout(self.layout).value}, router={self.routing}, recipe={self.recipe}"
        )


def _moved(values: Tensor, device: torch.device) -> Tensor:
    """For good, so no tensor of inference mode; zeros where there was no data."""
    with torch.inference_mode(False):
        return torch.zeros_like(values, device=device) if values.is_meta else values.to(device)


def _bias_in_fp32(layer: nn.Module, _: object) -> None:
    """After ``load_state_dict(..., assign=True)``, which takes the dtype of the checkpoint."""
    assert isinstance(layer, MoE) and layer.correction_bias is not None
    if layer.correction_bias.dtype is not torch.float32:
        layer.correction_bias = layer.correction_bias.float()


def _say_layout(layer: MoE, _: object, prefix: str, metadata: dict[str, Any]) -> None:
    """How gate and up lie, beside the version that torch notes for each module of a ``state_dict``."""
    metadata["layout"] = as_layout(layer.layout).value


def update_correction_bias(model: nn.Module, rate: float, *, group: ProcessGroup | None = None) -> None:
    """Balance the load of every :class:`MoE` of ``model`` that has a ``correction_bias``, once after each optimizer
    step: ``rate`` is added to the bias of experts that got fewer tokens than the mean since the last call, and
    subtracted from that of experts that got more (DeepSeek-V3, arXiv 2412.19437, section 2.1.2, where it is 1e-3).

    Counted are all forwards in training mode, each once: the micro-batches of a step, not an evaluation, and not the
    recomputation of a checkpoint. Nothing waits for the device, so this may be part of a CUDA graph.

    Args:
        group: sum the counts over these processes first, in one ``all_reduce``. All of them must call this.
            ``torch.distributed.group.WORLD`` is the default group. None: no communication.
    """
    checks.number("rate", rate, lowest=0)
    layers = [layer for layer in _layers(model, "update_correction_bias") if layer.correction_bias is not None]
    if not layers:
        raise ValueError(
            "update_correction_bias needs a layer with a correction_bias, which comes with "
            f"router=SigmoidGroupedTopK(...); {type(model).__name__} has none."
        )
    biases_E = [layer.correction_bias for layer in layers if layer.correction_bias is not None]
    totals_E = [layer.counts_since_update for layer in layers if layer.counts_since_update is not None]
    move_biases(biases_E, totals_E, rate, group)


@contextmanager
def fp8_training(model: nn.Module, recipe: Fp8Recipe | None = None) -> Iterator[None]:
    """Every :class:`MoE` of ``model`` computes with ``recipe``, by default ``Fp8Recipe()``, inside the block; then each
    has its own recipe again. Blocks may overlap, as in threads or generators: the latest that is open counts. Backward
    may run outside: a pass ends in the recipe that its forward had, also where activation checkpointing computes it
    again (``training/recompute.py``).
    """
    recipe = Fp8Recipe() if recipe is None else recipe
    if not isinstance(recipe, Fp8Recipe):
        raise TypeError(f"fp8_training needs an Fp8Recipe; got {type(recipe).__name__} ({recipe!r}).")
    layers = [(layer, [layer.recipe], layer._last_forward.block) for layer in _layers(model, "fp8_training")]
    recomputes = in_backward()  # a checkpointed function that holds this block
    try:
        for layer, before, _ in layers:
            layer._before_blocks.append(before)
            layer.recipe = recipe
            if recomputes:
                layer._last_forward.block = recipe
        yield
    finally:
        for layer, before, last in layers:
            _end_block(layer, before)
            if recomputes:
                layer._last_forward.block = last


def _end_block(layer: MoE, before: list[Recipe]) -> None:
    """The recipe before the block is back, or will be when the next later block that is open ends."""
    blocks = layer._before_blocks
    at = [block is before for block in blocks].index(True)
    del blocks[at]
    if at == len(blocks):
        (layer.recipe,) = before
    else:
        blocks[at][:] = before


@contextmanager
def constant_weights(model: nn.Module) -> Iterator[None]:
    """No expert weight of ``model`` changes inside the block, so that FP8 layers quantize each once: the micro-batches
    of one optimizer step, or an evaluation. See ``quantization/weight_cache.py`` for what is noticed nevertheless.
    """
    with ExitStack() as held:
        for layer in _layers(model, "constant_weights"):
            held.enter_context(layer.weight_cache.hold())
        yield


def _layers(model: object, what: str) -> list[MoE]:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{what} needs a torch.nn.Module; got {checks.describe(model)}. Put several in a torch.nn.ModuleList."
        )
    layers = [m for m in model.modules() if isinstance(m, MoE)]
    if not layers:
        raise ValueError(f"{what} needs a model with at least one MoE layer; {type(model).__name__} has none.")
    return layers
