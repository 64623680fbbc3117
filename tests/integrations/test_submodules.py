"""What acts on ``router``, ``c_fc`` and ``c_proj`` as modules acts on the layer: each way of use, against a layer that
holds the weights it should end up with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.utils import parametrize, prune

import supersonic_moe as sm

T, H, I, E, K = 24, 32, 16, 4, 2  # noqa: E741
PARTS = ("router", "c_fc", "c_proj")


def moe(**options: object) -> sm.MoE:
    torch.manual_seed(0)
    return sm.MoE(E, K, H, I, "swiglu", True, 0.1, **options)


def hidden_states() -> Tensor:
    return torch.linspace(-1, 1, T * H).sin().view(T, H)


def run(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """(output, gradient of x), and gradients of the parameters."""
    x = hidden_states().requires_grad_()
    out, aux_loss = layer(x)
    (out.square().sum() + aux_loss).backward()
    assert x.grad is not None
    return out.detach(), x.grad


def with_weights(change: Callable[[str, Tensor], Tensor]) -> sm.MoE:
    """A layer whose weights are changed for good."""
    layer = moe()
    with torch.no_grad():
        for part in PARTS:
            weight = getattr(layer, part).weight
            weight.copy_(change(part, weight))
    return layer


class Shrink(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def test_parametrizations() -> None:
    layer = moe()
    for part in PARTS:
        parametrize.register_parametrization(getattr(layer, part), "weight", Shrink())
    twin = with_weights(lambda part, weight: 0.5 * weight)
    for got, want in zip(run(layer), run(twin), strict=True):
        torch.testing.assert_close(got, want)
    for part in PARTS:
        original = getattr(layer, part).parametrizations.weight.original
        torch.testing.assert_close(original.grad, 0.5 * getattr(twin, part).weight.grad)


def test_pruning_follows_the_weight() -> None:
    """Its hook makes the weight anew in each call; so a step of the optimizer is seen by the next one."""
    layer = moe()
    for part in PARTS:
        prune.random_unstructured(getattr(layer, part), "weight", amount=0.5)
        with torch.no_grad():
            getattr(layer, part).weight_orig.mul_(2)
    twin = with_weights(lambda part, weight: 2 * weight * getattr(layer, part).weight_mask)
    for got, want in zip(run(layer), run(twin), strict=True):
        torch.testing.assert_close(got, want)
    assert layer.router.weight_orig.grad.ne(0).any()
    assert layer.router.weight_orig.grad[layer.router.weight_mask == 0].eq(0).all()


def test_hooks_run_and_may_change_what_a_part_gives() -> None:
    layer, seen = moe(), []
    for part in PARTS:
        module = getattr(layer, part)
        module.register_forward_pre_hook(lambda module, args, part=part: seen.append((part, "before")))
        module.register_full_backward_hook(lambda module, to, of, part=part: seen.append((part, "backward")))
    layer.router.register_forward_hook(lambda module, args, logits: 2 * logits)
    layer.c_proj.register_forward_hook(lambda module, args, given: (2 * given[0], given[1]))
    twin = with_weights(lambda part, weight: weight if part == "c_fc" else 2 * weight)
    for got, want in zip(run(layer), run(twin), strict=True):
        torch.testing.assert_close(got, want)
    assert set(seen) == {(part, when) for part in PARTS for when in ("before", "backward")}


def test_global_hooks_run_for_each_part() -> None:
    layer, seen = moe(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, given: seen.append(module))
    try:
        run(layer)
    finally:
        handle.remove()
    assert {layer.router, layer.c_fc, layer.c_proj} <= set(seen)


class LowRank(nn.Module):
    """A LoRA adapter around a router."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(H, 2, bias=False), nn.Linear(2, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x) + self.up(self.down(x))
        return logits


@pytest.mark.parametrize("logits_dtype", [None, torch.float64])
def test_a_router_of_another_class_is_used_and_learns(logits_dtype: torch.dtype | None) -> None:
    layer = moe(router_dtype=logits_dtype)
    layer.router = LowRank(layer.router)
    delta = layer.router.up.weight @ layer.router.down.weight
    twin = with_weights(lambda part, weight: weight + delta if part == "router" else weight)
    for got, want in zip(run(layer), run(twin), strict=True):
        torch.testing.assert_close(got, want)
    assert layer.router.up.weight.grad.ne(0).any() and layer.router.down.weight.grad.ne(0).any()


def test_a_linear_layer_in_place_of_the_router_computes_in_router_dtype() -> None:
    """What does not is refused; FSDP's mixed precision that rounds the router's output, for instance."""
    layer, twin = (moe(router_dtype=torch.float64).bfloat16() for _ in range(2))
    layer.router = nn.Linear(H, E, bias=False, dtype=torch.bfloat16)
    layer.router.load_state_dict(twin.router.state_dict())
    x = hidden_states().bfloat16()
    got, want = (m(x, return_routing=True)[2].router_logits for m in (layer, twin))
    assert got.dtype is torch.float64 and torch.equal(got, want)
    layer.router = nn.Linear(H, E, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"in router_dtype, torch.float64; got bfloat16 .* from a Linear\..*Router\("):
        layer(x)


def test_a_bias_of_the_router_counts() -> None:
    layer = moe()
    layer.router = nn.Linear(H, E)
    nn.init.zeros_(layer.router.weight)
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([0.0, 9.0, 9.0, 0.0]))
    run(layer)
    assert layer.expert_counts.tolist() == [0, T, T, 0]
    assert layer.router.bias.grad is not None


@pytest.mark.parametrize(
    ("router", "words"),
    [
        (nn.Linear(H, E + 1), r"router's output must have shape \(24, 4\) .*got \(24, 5\)"),
        (nn.LSTM(H, E), "router's output must be a torch.Tensor"),
        (nn.Sequential(nn.Linear(H, E), nn.Unflatten(1, (2, 2))), "router's output must have 2 dimensions"),
    ],
)
def test_a_router_that_gives_no_logits_is_refused(router: nn.Module, words: str) -> None:
    layer = moe()
    layer.router = router
    with pytest.raises((TypeError, ValueError), match=words):
        layer(hidden_states())


def test_a_part_that_gives_no_weights_is_refused() -> None:
    layer = moe()
    layer.c_fc = nn.Linear(H, 2 * I)
    with pytest.raises(TypeError, match=r"a call of c_fc must return \(weight, bias\).*Keep an Experts in c_fc"):
        layer(hidden_states())


def test_pefts_adapters_on_the_router_and_on_expert_weights() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("moe", moe())
    plain = copy.deepcopy(model)
    config = peft.LoraConfig(
        r=2, target_modules=["router"], target_parameters=["c_fc.weight", "c_proj.weight"], init_lora_weights=False
    )
    tuned = peft.get_peft_model(model, config)
    out, _ = run(tuned)
    assert not torch.allclose(out, run(plain)[0])
    trained = {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}
    assert all(any(part in name for name in trained) for part in PARTS)
    assert all(grad is not None and grad.ne(0).any() for grad in trained.values())
    merged = tuned.merge_and_unload()
    torch.testing.assert_close(run(merged)[0], out)


def test_accelerates_offload_of_every_part() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer = moe()
    want, _ = layer(hidden_states())
    for part in PARTS:
        module = getattr(layer, part)
        values = {name: value.detach().clone() for name, value in module.named_parameters()}
        hook = hooks.AlignDevicesHook("cpu", offload=True, weights_map=values)
        hooks.add_hook_to_module(module, hook)
        assert module.weight.is_meta  # away until it is called
    with torch.no_grad():
        assert torch.equal(layer(hidden_states())[0], want)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("whole", [False, True], ids=["parts alone", "in a sharded layer"])
@pytest.mark.parametrize(("parts", "reshard"), [(("router",), True), (("router",), False), (PARTS, False)])
def test_fsdp_units_of_parts(parts: tuple[str, ...], reshard: bool, whole: bool) -> None:
    mesh, layer, twin = init_device_mesh("cpu", (1,)), moe(), moe()
    for part in parts:
        fully_shard(getattr(layer, part), mesh=mesh, reshard_after_forward=reshard)
    if whole:
        fully_shard(layer, mesh=mesh)
    for _ in range(2):  # backward shards again
        for got, want in zip(run(layer), run(twin), strict=True):
            torch.testing.assert_close(got, want)
    for got, want in zip(layer.parameters(), twin.parameters(), strict=True):
        grad = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
        torch.testing.assert_close(grad, want.grad)


@pytest.mark.usefixtures("one_process")
def test_distributed_tensors_are_refused_in_a_sentence() -> None:
    """Torch's own words are "got mixed torch.Tensor and DTensor"."""
    mesh, words = init_device_mesh("cpu", (1,)), r"must be a tensor of this process; got a DTensor.*\.to_local\(\)"

    def spread(t: Tensor) -> Tensor:
        return distribute_tensor(t.detach(), mesh, [Replicate()])

    with pytest.raises(TypeError, match="x " + words):
        moe()(spread(hidden_states()))
    for part, name in (("router", "router_weight"), ("c_fc", "w1"), ("c_proj", "w2")):
        layer = moe()
        getattr(layer, part).weight = nn.Parameter(spread(getattr(layer, part).weight))
        with pytest.raises(TypeError, match=f"{name} {words}"):
            layer(hidden_states())
    layer = moe()
    layer.c_fc.bias = nn.Parameter(spread(layer.c_fc.bias))
    with pytest.raises(TypeError, match="b1 " + words):
        layer(hidden_states())


@pytest.mark.usefixtures("one_process")
def test_an_fsdp_unit_that_is_freed_before_its_weights_are_used_is_refused() -> None:
    layer, mesh = moe(), init_device_mesh("cpu", (1,))
    fully_shard(layer.c_fc, mesh=mesh, reshard_after_forward=True)
    with pytest.raises(RuntimeError, match=r"c_fc\.weight was freed.*Shard the MoE as one unit, fully_shard\(moe\)"):
        layer(hidden_states())
