"""Activation checkpointing after something that is no argument has changed: the gradients are those without it, to the
bit, for both kinds of checkpoint.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import supersonic_moe as sm
from supersonic_moe.training.recompute import STEPS

T, H, I, E, K = 48, 32, 16, 4, 2  # noqa: E741

Run = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
PLAIN: Run = lambda layer, x: layer(x)  # noqa: E731


def checkpointed(**kwargs: Any) -> Run:
    return lambda layer, x: checkpoint(layer, x, **kwargs)


KINDS = {name: checkpointed(use_reentrant=name == "reentrant") for name in ("reentrant", "non-reentrant")}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def run(request: pytest.FixtureRequest) -> Run:
    return request.param


def moe(dtype: torch.dtype = torch.float32, **kwargs: Any) -> sm.MoE:
    torch.manual_seed(0)
    return sm.MoE(E, K, H, I, "swiglu", True, 0.3, **kwargs).to(dtype)


def gradients(layer: nn.Module, out: tuple[Tensor, Tensor], x: Tensor) -> list[Tensor]:
    """And none are left behind."""
    (out[0].float().square().sum() + out[1]).backward()
    found = [x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return found


def tokens(seed: int = 1, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(T, H, device=device).to(dtype).requires_grad_()


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(b.any() for b in want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- recipe ----------------------------------------------------------------------------------------------------------


def evaluate(layer: sm.MoE) -> None:
    with torch.no_grad():
        layer.eval()(tokens(9, torch.bfloat16))
    layer.train()


@pytest.mark.parametrize("between", [lambda layer: None, evaluate], ids=["nothing", "evaluation"])
def test_a_pass_ends_in_the_recipe_of_its_forward(run: Run, between: Callable[[sm.MoE], None]) -> None:
    layer, results = moe(torch.bfloat16), []
    for way in (PLAIN, run):
        x = tokens(dtype=torch.bfloat16)
        with sm.fp8_training(layer):
            out = way(layer, x)
        between(layer)
        results.append(gradients(layer, out, x))
    assert_equal(*results)
    x = tokens(dtype=torch.bfloat16)
    in_bf16 = gradients(layer, run(layer, x), x)
    assert not torch.equal(in_bf16[0], results[0][0]), "the next forward is in BF16 again"


def test_the_recipe_of_a_forward_may_have_been_none(run: Run) -> None:
    layer, results = moe(torch.bfloat16), []
    for way in (PLAIN, run):
        x = tokens(dtype=torch.bfloat16)
        layer.recipe = None
        out = way(layer, x)
        layer.recipe = sm.Fp8Recipe()
        results.append(gradients(layer, out, x))
    assert_equal(*results)


class TwoRecipes(nn.Module):
    """One layer, in FP8 and then in BF16, within what a checkpoint computes again."""

    def __init__(self, layer: sm.MoE) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with sm.fp8_training(self):
            first, _ = self.layer(x)
        second, aux = self.layer(x)
        return first - 2 * second, aux


def test_a_block_inside_a_checkpoint_has_its_recipe_again(run: Run) -> None:
    both, results = TwoRecipes(moe(torch.bfloat16)), []
    for way in (PLAIN, run):
        x = tokens(dtype=torch.bfloat16)
        results.append(gradients(both, way(both, x), x))
    assert_equal(*results)


# ---- correction bias -------------------------------------------------------------------------------------------------


def in_place(layer: sm.MoE) -> None:
    layer.correction_bias += torch.tensor([9.0, -9.0, 0.0, 0.0])


def replaced(layer: sm.MoE) -> None:
    layer.correction_bias = torch.tensor([9.0, -9.0, 0.0, 0.0])


def updated(layer: sm.MoE) -> None:
    sm.update_correction_bias(layer, 1.0)


@pytest.mark.parametrize("move", [in_place, replaced, updated])
def test_recompute_routes_as_the_forward_did(run: Run, move: Callable[[sm.MoE], None]) -> None:
    """Twice, so that a bias that has moved before is remembered too; then the new one is in use."""
    layers = [moe(router="sigmoid_grouped_topk") for _ in KINDS]
    for seed in (1, 2):
        results = []
        for way, layer in zip((PLAIN, run), layers, strict=True):
            x = tokens(seed)
            out = way(layer, x)
            move(layer)
            results.append(gradients(layer, out, x))
        assert_equal(*results)
    plain, used = layers
    assert torch.equal(plain(tokens())[0], used(tokens())[0])
    assert torch.equal(plain.expert_counts, used.expert_counts)


def test_copies_of_a_layer_remember_nothing() -> None:
    layer = moe(router="sigmoid_grouped_topk")
    layer(tokens())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        in_place(twin)
        x, y = tokens(), tokens()
        want = copy.deepcopy(twin)
        assert_equal(gradients(twin, KINDS["reentrant"](twin, x), x), gradients(want, want(y), y))


# ---- step of token rounding ------------------------------------------------------------------------------------------

SAMPLED = sm.TokenRounding(mode="SR-f", tile=8)


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recompute_rounds_with_the_same_draw(reentrant: bool, preserve: bool) -> None:
    layer, results = moe(router=SAMPLED), []
    for way in (PLAIN, checkpointed(use_reentrant=reentrant, preserve_rng_state=preserve)):
        x = tokens()
        out = way(layer, x)
        torch.rand(1)  # the generator goes on
        results.append(gradients(layer, out, x))
    assert_equal(*results)


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
@pytest.mark.parametrize("router", [SAMPLED, "sigmoid_grouped_topk"])
def test_selective_checkpointing(router: Any, policy: CheckpointPolicy) -> None:
    """What is computed again may call no op that the forward did not."""
    layer, results = moe(router=router), []
    contexts = partial(create_selective_checkpoint_contexts, lambda context, op, *args, **kwargs: policy)
    for way in (PLAIN, checkpointed(use_reentrant=False, context_fn=contexts)):
        x = tokens()
        results.append(gradients(layer, way(layer, x), x))
    assert_equal(*results)


def test_draws_on_another_device_are_forgotten(run: Run) -> None:
    layer = moe(router=SAMPLED).to("meta")
    layer(tokens(device="meta"))
    layer.to_empty(device="cpu").reset_parameters()
    x = tokens()
    assert all(g.isfinite().all() for g in gradients(layer, run(layer, x), x))


@pytest.mark.parametrize("before", [True, False], ids=["trained", "evaluated"])
def test_a_layer_whose_mode_has_changed_is_recomputed_in_that_of_its_forward(run: Run, before: bool) -> None:
    """Of a layer in evaluation gradients are wanted too: then the base router is what ran."""
    layer, results = moe(router=sm.TokenRounding(tile=8)), []
    for way in (PLAIN, run):
        x = tokens()
        out = way(layer.train(before), x)
        results.append(gradients(layer.train(not before), out, x))
    assert_equal(*results)
    x = tokens()
    out = run(layer, x)
    assert not torch.equal(gradients(layer, out, x)[0], results[0][0]), "the next forward is in the new mode"


def train_in_fp8(layer: sm.MoE) -> None:
    with sm.fp8_training(layer):
        layer(tokens(9, torch.bfloat16))


def train_and_move(layer: sm.MoE) -> None:
    layer(tokens(9, torch.bfloat16))
    in_place(layer)


def train_and_hook(layer: sm.MoE) -> None:
    layer(tokens(9, torch.bfloat16))
    layer.router.register_forward_hook(lambda module, args, out: 3 * out)


@pytest.mark.parametrize(
    ("router", "train"),
    [
        ("softmax_after_topk", train_in_fp8),
        ("sigmoid_grouped_topk", train_and_move),
        ("softmax_after_topk", train_and_hook),
        (sm.TokenRounding(tile=8), train_in_fp8),
    ],
    ids=["recipe", "bias", "router", "mode"],
)
def test_in_evaluation_nothing_of_an_earlier_training_is_read(
    run: Run, router: Any, train: Callable[..., None]
) -> None:
    """The first run of a reentrant checkpoint has no gradients, and looks like an evaluation that gets no backward."""
    results = []
    for way in (PLAIN, run):
        layer = moe(torch.bfloat16, router=router)
        train(layer)
        x = tokens(dtype=torch.bfloat16)
        results.append(gradients(layer, way(layer.eval(), x), x))
    assert_equal(*results)


def test_an_evaluation_before_backward_leaves_the_mode_of_a_training_forward() -> None:
    layer, results = moe(router=sm.TokenRounding(tile=8)), []
    for way in (PLAIN, KINDS["non-reentrant"]):
        x = tokens()
        out = way(layer.train(), x)
        with torch.no_grad():
            layer.eval()(tokens(9))
        results.append(gradients(layer, out, x))
    assert_equal(*results)


def test_each_of_several_forwards_under_way_finds_its_own_draw(run: Run) -> None:
    layer, results = moe(router=SAMPLED), []
    for way in (PLAIN, run):
        torch.manual_seed(5)
        xs = [torch.randn(T, H, requires_grad=True) for _ in range(4)]
        outs = [way(layer, x) for x in xs]
        results.append([g for out, x in zip(outs, xs, strict=True) for g in gradients(layer, out, x)])
    assert_equal(*results)


def test_forwards_draw_anew(run: Run) -> None:
    layer, counts = moe(router=SAMPLED), set()
    x = tokens().detach()
    for _ in range(2 * STEPS):
        layer(x)
        counts.add(tuple(layer.expert_counts.tolist()))
    assert len(counts) > 4


# ---- CUDA graphs -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("inside", [False, True], ids=["between replays", "in the graph"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gpu_graphs_route_as_their_forward_did(reentrant: bool, inside: bool) -> None:
    """The bias moves between forward and backward: within one graph, or between the replays of two."""
    dtype = torch.bfloat16
    layer = moe(dtype, router="sigmoid_grouped_topk").cuda()
    plain = copy.deepcopy(layer)
    way = checkpointed(use_reentrant=reentrant, preserve_rng_state=False)
    x = tokens(1, dtype, "cuda")
    move = torch.tensor([9.0, -9.0, 0.0, 0.0], device="cuda")

    def forward() -> Tensor:
        return way(layer, x)[0].float().square().sum()

    def backward(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [x, *layer.parameters()])) if not reentrant else _accumulated(loss)

    def _accumulated(loss: Tensor) -> list[Tensor]:
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return [leaf.grad for leaf in leaves]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward(forward())
    torch.cuda.current_stream().wait_stream(side)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    if inside:
        with torch.cuda.graph(first):
            loss = forward()
            layer.correction_bias.add_(move)
            got = backward(loss)
    else:
        with torch.cuda.graph(first):
            loss = forward()
        with torch.cuda.graph(second, pool=first.pool()):
            got = backward(loss)
    for _ in range(3):
        y = x.detach().clone().requires_grad_()
        want = torch.autograd.grad(plain(y)[0].float().square().sum(), [y, *plain.parameters()])
        first.replay()
        if not inside:
            layer.correction_bias.add_(move)
            second.replay()
        plain.correction_bias.add_(move)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with torch.no_grad():
            x.copy_(torch.randn_like(x))


@pytest.mark.parametrize("hooked", ["forward", "backward"])
def test_hooks_of_all_modules_that_come_or_go_before_backward_change_nothing(run: Run, hooked: str) -> None:
    """A FLOP counter hooks every module, and a router with hooks is called instead of being fused."""
    layer, x = moe(), tokens()
    want = gradients(layer, PLAIN(layer, x), x)
    x = tokens()
    with FlopCounterMode(display=False) if hooked == "forward" else nullcontext():
        out = run(layer, x)
    with FlopCounterMode(display=False) if hooked == "backward" else nullcontext():
        got = gradients(layer, out, x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
