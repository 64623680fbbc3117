"""The modules inside a :class:`MoE` and the way it uses them: as modules, by calling them.

Whatever acts on a call acts on these too: hooks, offload, pruning, parametrizations, adapters, a router of another
class. The call of an ``Experts`` hands out its weight and bias; the call of the router gives logits.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from supersonic_moe import checks
from supersonic_moe.autograd import apply
from supersonic_moe.private_api import active_ddp, member_of, runs_hooks
from supersonic_moe.training.router_linear import linear_in


class Router(nn.Linear):
    """x (T, H) -> logits (T, E).

    Args:
        hidden_size: H. num_experts: E. std: of the normal initialisation.
        logits_dtype: compute the logits in this dtype, under autocast too, whatever the dtypes of x and of the weight.
            None: as any linear layer.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        std: float,
        logits_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.positive_sizes(hidden_size=hidden_size, num_experts=num_experts)
        checks.number("std", std, lowest=0)
        if logits_dtype is not None:
            checks.floating_dtype("logits_dtype", logits_dtype)
        self.std, self.logits_dtype = std, logits_dtype  # first, because nn.Linear initialises its weight
        super().__init__(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0, self.std)

    def forward(self, input: Tensor) -> Tensor:
        if self.logits_dtype is None:
            return F.linear(input, self.weight)
        return linear_in(input, self.weight, self.logits_dtype)

    def extra_repr(self) -> str:
        dtype = "" if self.logits_dtype is None else f", logits_dtype={self.logits_dtype}"
        return f"hidden_size={self.in_features}, num_experts={self.out_features}{dtype}"


class Experts(nn.Module):
    """Weights of all experts for one projection: weight (E, out_features, in_features), bias (E, out_features). A call
    returns both, and multiplies nothing.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        add_bias: bool,
        std: float,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_sizes(num_experts=num_experts, in_features=in_features, out_features=out_features)
        checks.flag("add_bias", add_bias)
        checks.number("std", std, lowest=0)
        self.gradient_divisor = 1
        """What gradients of weight and bias are divided by, as ``parallel.shard_experts`` explains."""
        self.num_experts, self.in_features, self.out_features, self.std = num_experts, in_features, out_features, std
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, out_features, device=device, dtype=dtype)) if add_bias else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._draw()
        if self.bias is not None:
            self.bias.zero_()

    def _draw(self) -> None:
        self.weight.normal_(0, self.std)

    def forward(self, hidden_states: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(weight, bias). ``hidden_states`` is there for wrappers that expect an input."""
        weight, bias = member_of(self, "weight"), member_of(self, "bias")
        if self.gradient_divisor == 1 or not torch.is_grad_enabled():
            return weight, bias
        return _divided(weight, self.gradient_divisor), None if bias is None else _divided(bias, self.gradient_divisor)

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


_passed: WeakKeyDictionary[nn.Module, WeakSet[nn.Module]] = WeakKeyDictionary()
"""Of each DistributedDataParallel, the experts that it leaves alone."""


class RankExperts(Experts):
    """Those of one rank of several: ``num_experts`` of them from expert ``first`` on, drawn from a sequence of their
    own, because ranks are often seeded alike.

    Data parallelism over ``others``, ranks of the default group that hold other experts, would take all of them for
    copies and mix them. DTensors that ``parallel.shard_experts`` makes of them are safe from that.

    Raises:
        RuntimeError: when ``fully_shard`` or a tensor-parallel plan replaces a weight, or in the first forward inside
            of DistributedDataParallel.
    """

    def __init__(self, first: int, others: frozenset[int], *sizes: Any, **options: Any) -> None:
        self.first, self.others = first, others  # first, because the constructor draws
        super().__init__(*sizes, **options)

    def _draw(self) -> None:  # a DTensor as a whole would draw alike on ranks that are seeded alike
        weight, generator = _local(self.weight), None
        if not weight.is_meta:
            seed = int(torch.randint(2**62, (), device="cpu")) + self.first + _part_of(self.weight)
            generator = torch.Generator(weight.device).manual_seed(seed)
        weight.normal_(0, self.std, generator=generator)

    def forward(self, hidden_states: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        data_parallel = None if torch.compiler.is_compiling() else active_ddp()
        if data_parallel is not None:
            self._check_left_alone(data_parallel)
        return super().forward(hidden_states)

    def _check_left_alone(self, data_parallel: Any) -> None:
        passed = _passed.setdefault(data_parallel, WeakSet())
        if self in passed:
            return
        shared = self.others.intersection(dist.get_process_group_ranks(data_parallel.process_group))
        own, left_alone = set(self.parameters(recurse=False)), data_parallel.parameters_to_ignore
        if shared and any(p in own and n not in left_alone for n, p in data_parallel.module.named_parameters()):
            raise self._mixed("DistributedDataParallel", shared)
        passed.add(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias") and hasattr(value, "device_mesh"):
            shared = self.others.intersection(value.device_mesh.mesh.flatten().tolist())
            if shared and not hasattr(self._parameters.get(name), "device_mesh"):
                raise self._mixed("sharding by fully_shard or a plan", shared)
        super().__setattr__(name, value)

    def _mixed(self, what: str, shared: frozenset[int]) -> RuntimeError:
        own = f"experts {self.first} to {self.first + self.num_experts - 1}"
        return RuntimeError(
            f"{what} takes {own} of this rank for copies of those of ranks {sorted(shared)}, which hold other experts, "
            "and mixes them: load this rank's again. Call parallel.shard_experts(model, mesh) before it; for "
            "fully_shard, pass what it returns as ignored_params."
        )


class _Divided(torch.autograd.Function):
    """``apply(weight, divisor)`` -> the weight, whose gradient is divided."""

    @staticmethod
    def forward(weight: Tensor, divisor: int) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.divisor = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.divisor, None


def _divided(weight: Tensor, divisor: int) -> Tensor:
    divided: Tensor = apply(_Divided, _local(weight), divisor)
    return divided


def _local(weight: Any) -> Tensor:
    """Of a DTensor the part that is here."""
    local: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return local


def _part_of(weight: Any) -> int:
    """Which part of the experts of a rank is here, where FSDP2 has sharded what ``parallel.shard_experts`` had."""
    if not hasattr(weight, "to_local"):
        return 0
    *others, _ranks = zip(weight.device_mesh.get_coordinate(), weight.placements, strict=True)
    return sum(at for at, placement in others if not placement.is_replicate())


def reset(part: nn.Module) -> None:
    """``reset_parameters`` of ``part``; of a router without one, a Sequential say, that of what it is made of."""
    own = getattr(part, "reset_parameters", None)
    if callable(own):
        own()
        return
    for child in part.children():
        reset(child)


def is_plain_linear(router: nn.Module) -> bool:
    """Whether a call of the router would do nothing but multiply by its weight, so that the product may be fused."""
    kind = type(router)
    if kind is Router:
        return router.logits_dtype is None and not runs_hooks(router)
    return kind is nn.Linear and member_of(router, "bias") is None and not runs_hooks(router)


def weights_of(experts: nn.Module, name: str, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) that a call of ``experts`` gives: an :class:`Experts`, or what stands in its place."""
    if type(experts) is Experts and not runs_hooks(experts):
        return experts.forward()  # what a call would do, at a third of its time
    given = experts() if isinstance(experts, Experts) else experts(hidden_states)
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor)):
        raise TypeError(
            f"a call of {name} must return (weight, bias), as that of Experts does; got {checks.describe(given)}. "
            f"Keep an Experts in {name}, or return what it returned."
        )
    _refuse_freed(given[0], name)
    return given


def _refuse_freed(weight: Tensor, name: str) -> None:
    """FSDP frees the gathered weight of a unit when the call of the unit ends. Here that call only hands it out."""
    if weight.numel() and not torch.compiler.is_compiling() and weight.untyped_storage().nbytes() == 0:
        raise RuntimeError(
            f"{name}.weight was freed when the call of {name} ended, before it was multiplied: a module that only "
            f"holds weights cannot be a unit of FSDP. Shard the MoE as one unit, fully_shard(moe), and not {name}; or "
            "pass reshard_after_forward=False."
        )
