"""A layer in one step (``training/layer.py``) is its parts, to the bit, in all that may be asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import supersonic_moe as sm
from supersonic_moe.training import layer

T, H, I, E, K = 37, 64, 48, 8, 2  # noqa: E741
CALLS = 4  # the first runs, the second is recorded, the others are played (jit/tape.py)


@contextlib.contextmanager
def in_one(one: bool) -> Iterator[None]:
    """Whether layers are one step, on a CPU too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "suits", lambda x, backend: one)
        yield


class Leaves(NamedTuple):
    x: Tensor
    router: Tensor
    w1: Tensor
    w2: Tensor
    scores: Tensor
    b1: Tensor
    b2: Tensor


def leaves(device: torch.device, frozen: tuple[str, ...] = (), scores: torch.dtype = torch.float32) -> Leaves:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(0.2).to(device, torch.bfloat16).requires_grad_()

    drawn = torch.rand(T, K, generator=generator).to(device, scores).requires_grad_()
    made = Leaves(
        normal(T, H), normal(E, H), normal(E, 2 * I, H), normal(E, H, I), drawn, normal(E, 2 * I), normal(E, H)
    )
    for name in frozen:
        getattr(made, name).requires_grad_(False)
    return made


def node_of(out: Tensor) -> str:
    return type(out.grad_fn).__name__


def layer_step(given: Leaves, biases: bool, losses: bool, options: dict[str, Any]) -> tuple[str, list[Tensor]]:
    x, router, w1, w2, _, b1, b2 = given
    biased = {"b1": b1, "b2": b2} if biases else {}
    out, logits, counts = sm.moe_layer(x, router, w1, w2, K, **options, **biased)
    loss = (out.float() * torch.arange(1, H + 1, device=x.device)).sum() * 0.01
    if losses:
        loss = loss + sm.switch_load_balancing_loss(logits, counts) + 0.1 * sm.router_z_loss(logits)
    loss.backward()
    return node_of(out), [out, logits, counts, *taken(given)]


def taken(given: Leaves) -> list[Tensor]:
    """Gradients, which are then gone."""
    found = [t.grad if t.grad is not None else torch.zeros(0) for t in given]
    found += [t.main_grad.clone() for t in given if hasattr(t, "main_grad")]
    for t in given:
        t.grad = None
        if hasattr(t, "main_grad"):
            t.main_grad.fill_(1)
    return found


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


BF16, FP8 = sm.Bf16Recipe(), sm.Fp8Recipe()
SIGMOID = sm.SigmoidGroupedTopK(num_groups=2, topk_groups=1)


@pytest.mark.parametrize("frozen", [(), ("x",), ("router",), ("x", "router"), ("w1", "b1")], ids="/".join)
@pytest.mark.parametrize(("biases", "losses"), [(False, True), (True, False)])
@pytest.mark.parametrize("recipe", [BF16, FP8, sm.Fp8Recipe(keep_transposed=False)], ids=str)
def test_a_layer_is_its_parts(
    recipe: Any, biases: bool, losses: bool, frozen: tuple[str, ...], device: torch.device
) -> None:
    bias = torch.linspace(-1, 1, E, device=device)
    routed = {"router": SIGMOID, "correction_bias": bias} if biases else {}
    for accumulate in (False, True):
        given = leaves(device, frozen)
        for w in (given.w1, given.w2) if accumulate else ():
            w.main_grad = torch.ones(w.shape, device=device)  # type: ignore[attr-defined]
        options = {"recipe": recipe, "accumulate_into_main_grad": accumulate, **routed}
        with in_one(False):
            node, want = layer_step(given, biases, losses, options)
        assert node != "LayerBackward"
        for _ in range(CALLS):
            with in_one(True):
                node, got = layer_step(given, biases, losses, options)
            assert node == "LayerBackward" and same_bits(got, want)


@pytest.mark.parametrize("router", ["softmax_after_topk", SIGMOID], ids=str)
@pytest.mark.parametrize("recipe", [BF16, FP8], ids=str)
def test_a_module_has_its_losses_and_counts(recipe: Any, router: Any, device: torch.device) -> None:
    module = sm.MoE(E, K, H, I, "swiglu", False, 0.2, router=router, recipe=recipe, z_loss_weight=0.1)
    module = module.to(device, torch.bfloat16)
    x = torch.randn(2, T, H, device=device).bfloat16().requires_grad_()

    def step(one: bool, *, output: bool = True) -> list[Tensor]:
        with in_one(one):
            out, aux = module(x)
        loss = out.float().square().mean() + aux if output else aux
        kept = [out, aux, module.expert_counts]
        return [*kept, *torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=not output)]

    want = step(False)
    for _ in range(CALLS):
        assert same_bits(step(True), want)
    with torch.no_grad():
        assert same_bits([*module(x)], want[:2])
    for mine, parts in zip(step(True, output=False), step(False, output=False), strict=True):
        assert (mine is None and parts is None) or torch.equal(mine, parts)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("scores", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", [BF16, FP8], ids=str)
def test_experts_of_ids_are_those_of_a_plan(
    recipe: Any, scores: torch.dtype, ids_dtype: torch.dtype, device: torch.device
) -> None:
    given = leaves(device, scores=scores)
    ids = torch.randint(-1, E + 1, (T, K), device=device, dtype=ids_dtype)

    def step(one: bool) -> tuple[str, list[Tensor]]:
        with in_one(one):
            x, _, w1, w2, s, b1, b2 = given
            out = sm.topk_experts(x, ids, s, w1, w2, b1=b1, b2=b2, recipe=recipe)
            out.backward(torch.ones_like(out))
            with torch.no_grad():
                again = sm.topk_experts(x, ids, s, w1, w2, b1=b1, b2=b2, recipe=recipe)
        return node_of(out), [out, again, *taken(given)]

    node, want = step(False)
    assert node != "FromIdsBackward"
    for _ in range(CALLS):
        node, got = step(True)
        assert node == "FromIdsBackward" and same_bits(got, want)


@pytest.mark.parametrize("recipe", [BF16, FP8], ids=str)
def test_nothing_is_recorded_where_nobody_asks(recipe: Any, device: torch.device) -> None:
    x, router, w1, w2, *_ = leaves(device)
    found = []
    for one in (False, *[True] * CALLS):
        with in_one(one), torch.no_grad():
            found.append([*sm.moe_layer(x, router, w1, w2, K, recipe=recipe)])
    assert all(same_bits(got, found[0]) and not any(t.requires_grad for t in got) for got in found)


def test_a_loss_of_the_logits_can_be_differentiated_twice_and_the_output_once(device: torch.device) -> None:
    x, router, w1, w2, *_ = leaves(device)
    second = []
    for one in (False, True):
        with in_one(one):
            out, logits, _ = sm.moe_layer(x, router, w1, w2, K)
        (dx,) = torch.autograd.grad(sm.router_z_loss(logits), x, create_graph=True)
        second.append(torch.autograd.grad(dx.float().square().sum(), [x, router], retain_graph=True))
    assert same_bits([*second[1]], [*second[0]])
    module, second = sm.MoE(E, K, H, I, "swiglu", False, 0.2).to(device, torch.bfloat16), []
    for one in (False, True):
        with in_one(one):
            _, aux = module(x)
        (dx,) = torch.autograd.grad(aux, x, create_graph=True)
        second.append(torch.autograd.grad(dx.float().square().sum(), [x, module.router.weight]))
    assert same_bits([*second[1]], [*second[0]])
    (dx,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of the experts"):
        dx.float().sum().backward()


@pytest.mark.parametrize("recipe", [BF16, FP8], ids=str)
@pytest.mark.parametrize("ids", [None, torch.rand(T, E).argsort(1)[:, :K]], ids=["layer", "ids"])
def test_a_checkpoint_hands_out_what_it_holds_once_a_pass(recipe: Any, ids: Any, device: torch.device) -> None:
    """With create_graph too, where a backward reads it to compute gradients and to connect them."""

    def run(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, scores: Tensor) -> Tensor:
        if ids is None:
            return sm.moe_layer(x, router, w1, w2, K, recipe=recipe).output
        return sm.topk_experts(x, ids.to(device), scores, w1, w2, recipe=recipe)

    found = []
    for call in (run, partial(checkpoint, run, use_reentrant=False)):
        given = leaves(device)
        wanted = [*given[:4]] if ids is None else [given.x, *given[2:5]]
        with in_one(True):
            found.append(torch.autograd.grad(call(*given[:5]).float().sum(), wanted, create_graph=True))
    assert same_bits([*found[1]], [*found[0]])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_run_again_keeps_the_same_whoever_counts_its_operations(
    reentrant: bool, device: torch.device
) -> None:
    given = leaves(device)

    def run(x: Tensor) -> Tensor:
        out, logits, counts = sm.moe_layer(x, given.router, given.w1, given.w2, K)
        return out.float().square().mean() + sm.switch_load_balancing_loss(logits, counts)

    with in_one(True):
        run(given.x).backward()
        want = taken(given)
        for counted in (False, True):
            loss = checkpoint(run, given.x, use_reentrant=reentrant)
            assert isinstance(loss, Tensor)
            with FlopCounterMode(display=False) if counted else contextlib.nullcontext():
                loss.backward()
            assert same_bits(taken(given), want)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy: CheckpointPolicy, device: torch.device) -> None:
    given = leaves(device)

    def run(x: Tensor) -> Tensor:
        return sm.moe_layer(x, given.router, given.w1, given.w2, K).output.float().square().mean()

    with in_one(True):
        run(given.x).backward()
        want = taken(given)
        contexts = partial(create_selective_checkpoint_contexts, lambda context, op, *args, **kwargs: policy)
        loss = checkpoint(run, given.x, use_reentrant=False, context_fn=contexts)
        assert isinstance(loss, Tensor)
        loss.backward()
    assert same_bits(taken(given), want)


def test_products_are_counted_as_those_of_the_parts(device: torch.device) -> None:
    x, router, w1, w2, *_ = leaves(device)
    flops = []
    for one in (False, True):
        with in_one(one), FlopCounterMode(display=False) as counter:
            sm.moe_layer(x, router, w1, w2, K).output.float().sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
