"""Load balance from step to step: counts, the correction bias and its update, what the module hands out, padding."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from host_waits import no_host_waits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import supersonic_moe as sm

T, H, I, E, K = 12, 16, 8, 4, 2  # noqa: E741


def moe(router: object = "sigmoid_grouped_topk", **options: object) -> sm.MoE:
    return sm.MoE(E, K, H, I, "swiglu", False, 0.5, router=router, **options)


def chosen(layer: sm.MoE, x: Tensor) -> Tensor:
    """(E,) counts by torch alone."""
    logits = x.reshape(-1, H) @ layer.router.weight.T
    return torch.bincount((logits.sigmoid() + layer.correction_bias).topk(K).indices.flatten(), minlength=E)


def backward(out: Tensor, aux_loss: Tensor) -> None:
    (out.square().sum() + aux_loss).backward()


# ---- counts and the update -------------------------------------------------------------------------------------------


def test_the_update_sees_every_micro_batch_and_no_evaluation():
    layer = moe()
    batches = torch.randn(3, T, H)
    for x in batches:
        backward(*layer(x))
    counts = chosen(layer, batches)
    layer(10 * torch.randn(5, H), is_inference_mode=True)
    layer.eval()(torch.randn(7, H))
    assert layer.expert_counts.sum() == 7 * K  # of the last forward, whatever it was
    assert layer.counts_since_update.tolist() == counts.tolist()
    sm.update_correction_bias(layer, 1e-3)
    want = 1e-3 * (counts.double().mean() - counts).sign()
    assert want.ne(0).any()
    torch.testing.assert_close(layer.correction_bias, want.float(), rtol=0, atol=0)
    sm.update_correction_bias(layer, 1e-3)  # nothing came since
    torch.testing.assert_close(layer.correction_bias, want.float(), rtol=0, atol=0)


def test_the_update_balances_the_load():
    torch.manual_seed(3)
    layer, x = moe(), torch.randn(256, H)
    with torch.no_grad():
        x[:, 0], layer.router.weight[0, 0] = 1, 3  # every token likes expert 0
        spread = []
        for _ in range(200):
            layer(x)
            spread.append((layer.expert_counts.max() - layer.expert_counts.min()).item())
            sm.update_correction_bias(layer, 5e-3)
    assert spread[-1] < 0.1 * spread[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(reentrant, compiled):
    layer = moe()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(2, T, H, requires_grad=True)
    for part in x:
        backward(*checkpoint(run, part, use_reentrant=reentrant))
    assert layer.counts_since_update.tolist() == chosen(layer, x).tolist()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("evaluated", [False, True])
def test_counts_follow_parameters_that_came_one_by_one(evaluated, compiled):
    """From the meta device by assignment, which moves nothing else; and tensors of inference mode change no more."""
    layer, x = moe(device="meta"), torch.randn(T, H)
    layer.load_state_dict(moe().state_dict(), assign=True)
    if evaluated:
        with torch.inference_mode():
            layer.eval()(x)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    layer.train()
    backward(*run(x))
    assert layer.expert_counts.tolist() == layer.counts_since_update.tolist() == chosen(layer, x).tolist()


def test_an_evaluation_before_backward_leaves_the_counts_of_a_forward_alone():
    """They are the caller's and autograd's, and are one tensor."""
    layer = moe()
    x = torch.randn(T, H)
    out, aux_loss, routing = layer(x, return_routing=True)
    wanted = routing.expert_counts.tolist(), torch.autograd.grad(out.sum() + aux_loss, layer.router.weight)[0]
    out, aux_loss, routing = layer(x, return_routing=True)
    with torch.inference_mode():
        layer(torch.randn(1, H))
    assert layer.expert_counts.sum() == K and not layer.expert_counts.is_inference()
    assert routing.expert_counts.tolist() == wanted[0]
    assert torch.equal(torch.autograd.grad(out.sum() + aux_loss, layer.router.weight)[0], wanted[1])


def test_counts_hold_more_than_int32():
    layer = moe()
    layer.counts_since_update += 2**31
    layer(torch.randn(T, H))
    assert layer.counts_since_update.sum() == E * 2**31 + T * K


def test_the_update_compares_exactly():
    """The mean of large counts is no float32."""
    layer = moe()
    layer.counts_since_update += torch.tensor([0, 0, 1, 3]) + 2**40
    sm.update_correction_bias(layer, 1.0)
    assert layer.correction_bias.tolist() == [1, 1, 0, -1]


def test_the_counts_of_all_ranks_are_added():
    """With the sum of two equal ranks the signs are the same; so one rank here speaks for another one, too."""
    model = nn.Sequential(
        moe(), moe("softmax_after_topk"), sm.MoE(3, 1, H, I, "swiglu", False, 0.5, router="sigmoid_grouped_topk")
    )
    first, _, last = model
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    others = {"first": torch.tensor([9, 0, 0, 0]), "last": torch.tensor([0, 0, 9])}

    def all_reduce(counts: Tensor, group: object) -> None:
        assert group is dist.group.WORLD
        counts += torch.cat([others["first"], others["last"]])

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "all_reduce", all_reduce)
            first.counts_since_update += torch.tensor([0, 1, 2, 3])
            last.counts_since_update += torch.tensor([5, 0, 0])
            sm.update_correction_bias(model, 0.5, group=dist.group.WORLD)
        assert first.correction_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
        assert last.correction_bias.tolist() == [-0.5, 0.5, -0.5]
        assert not first.counts_since_update.any() and not last.counts_since_update.any()
        first.counts_since_update += torch.tensor([1, 0, 0, 0])
        sm.update_correction_bias(model, 0.5, group=dist.group.WORLD)  # the real one
        assert first.correction_bias.tolist() == [-1.0, 1.0, 1.0, 1.0]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("model", "rate", "words"),
    [
        (nn.Linear(2, 2), 1e-3, "needs a model with at least one MoE layer"),
        (sm.MoE(E, K, H, I, "swiglu", False, 0.5), 1e-3, "needs a layer with a correction_bias.*SigmoidGroupedTopK"),
        (moe(), "fast", "rate must be a number"),
        (moe(), -1e-3, "rate must be finite and at least 0"),
    ],
)
def test_an_update_that_cannot_be_is_refused(model, rate, words):
    with pytest.raises((TypeError, ValueError), match=words):
        sm.update_correction_bias(model, rate)


def test_data_parallel_wrappers_leave_the_counts_of_a_rank_alone():
    """DistributedDataParallel overwrites buffers by those of the first rank in every forward."""
    assert [name for name, _ in moe().named_buffers()] == ["correction_bias"]


# ---- the bias is fp32 ------------------------------------------------------------------------------------------------


def test_the_bias_stays_fp32_when_a_checkpoint_is_assigned():
    layer, low = moe(), {name: value.bfloat16() for name, value in moe().state_dict().items()}
    low["correction_bias"] += 1.0
    layer.load_state_dict(low, assign=True)
    assert layer.router.weight.dtype == torch.bfloat16
    assert layer.correction_bias.dtype == torch.float32
    layer.counts_since_update += torch.arange(E)
    sm.update_correction_bias(layer, 1e-3)
    assert layer.correction_bias.tolist() == pytest.approx([1.001, 1.001, 0.999, 0.999], abs=1e-6)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(twin.correction_bias, layer.correction_bias)


# ---- logits, ids and counts on request -------------------------------------------------------------------------------


def test_the_module_hands_out_what_losses_of_ones_own_need():
    layer = moe(z_loss_weight=0.5)
    x = torch.randn(3, T, H)
    plain = layer(x)
    out, aux_loss, routing = layer(x, return_routing=True)
    assert torch.equal(out, plain[0]) and torch.equal(aux_loss, plain[1])
    torch.testing.assert_close(routing.router_logits, x.view(-1, H) @ layer.router.weight.T)
    assert torch.equal(routing.expert_counts, layer.expert_counts)
    assert torch.bincount(routing.expert_ids.flatten(), minlength=E).tolist() == routing.expert_counts.tolist()

    counts_BE = sm.sequence_expert_counts(routing.expert_ids, 3, E)
    loss = sm.sequence_load_balancing_loss(routing.router_logits.view(3, T, E), counts_BE, router=layer.routing)
    each = [
        sm.switch_load_balancing_loss(logits, counts, router=layer.routing)
        for logits, counts in zip(routing.router_logits.view(3, T, E), counts_BE, strict=True)
    ]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    (grad,) = torch.autograd.grad(loss, layer.router.weight)
    assert grad.ne(0).any()


def test_routing_of_inference_and_of_token_rounding():
    x = torch.randn(T, H)
    _, aux_loss, routing = moe()(x, is_inference_mode=True, return_routing=True)
    assert aux_loss is None and routing.expert_ids.shape == (T, K)
    rounding = moe(sm.TokenRounding(tile=4))
    _, _, routing = rounding(x, return_routing=True)
    assert routing.expert_ids is None
    assert torch.equal(routing.expert_counts, rounding.expert_counts)


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["softmax_after_topk", "softmax_before_topk", "sigmoid_grouped_topk"])
@pytest.mark.parametrize("called", [False, True], ids=["fused router", "called router"])
def test_padding_is_as_good_as_absent(router, called):
    """Outputs, losses, counts and every gradient are those of the batch without it, whatever stands there."""
    layer = moe(router, z_loss_weight=0.1).double()
    if called:
        layer.router.register_forward_hook(lambda module, args, logits: logits.clone())
    mask = torch.rand(3, T) < 0.6
    values = torch.randn(3, T, H, dtype=torch.float64)
    poisoned = torch.where(mask[..., None], values, torch.nan)

    def run(x: Tensor, **options: object) -> list[Tensor]:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        out, aux_loss, routing = layer(x, return_routing=True, **options)
        backward(out, aux_loss)
        return [out, x.grad, aux_loss, routing.expert_counts, *(p.grad for p in layer.parameters())]

    out, dx, *got = run(poisoned, token_mask=mask)
    want_out, want_dx, *want = run(values[mask])
    assert out[~mask].eq(0).all() and dx[~mask].eq(0).all()
    for a, b in zip((out[mask], dx[mask], *got), (want_out, want_dx, *want), strict=True):
        torch.testing.assert_close(a, b)
    assert layer(values)[1] != got[0]  # padding would have counted


@pytest.mark.parametrize("router", ["softmax_after_topk", "sigmoid_grouped_topk"])
def test_losses_without_padding(router):
    mask = torch.rand(3, T) < 0.5
    mask[1] = False
    logits = torch.randn(3, T, E).masked_fill(~mask[..., None], torch.nan).requires_grad_()
    ids = logits.detach().topk(K).indices.masked_fill(~mask[..., None], -1)
    counts = sm.sequence_expert_counts(ids.view(-1, K), 3, E)
    got = {
        "switch": sm.switch_load_balancing_loss(
            logits.view(-1, E), counts.sum(0), router=router, token_mask_T=mask.view(-1)
        ),
        "z": sm.router_z_loss(logits.view(-1, E), token_mask_T=mask.view(-1)),
        "sequence": sm.sequence_load_balancing_loss(logits, counts, router=router, token_mask_BS=mask),
    }
    kept = logits[mask]
    each = [sm.switch_load_balancing_loss(logits[b][mask[b]], counts[b], router=router) for b in (0, 2)]
    want = {
        "switch": sm.switch_load_balancing_loss(kept, counts.sum(0), router=router),
        "z": sm.router_z_loss(kept),
        "sequence": sum(each) / 3,
    }
    for name in got:
        torch.testing.assert_close(got[name], want[name])
        (a,), (b,) = (torch.autograd.grad(loss[name], logits, retain_graph=True) for loss in (got, want))
        torch.testing.assert_close(a, b)


def test_a_batch_of_padding_alone():
    layer, x = moe(), torch.randn(T, H, requires_grad=True)
    out, aux_loss = layer(x, token_mask=torch.zeros(T, dtype=torch.bool))
    backward(out, aux_loss)
    assert out.eq(0).all() and aux_loss == 0 and x.grad.eq(0).all()
    assert layer.router.weight.grad.eq(0).all() and not layer.expert_counts.any()


@pytest.mark.parametrize(
    ("layer", "mask", "words"),
    [
        (moe(), torch.ones(T), "token_mask must be a bool tensor of shape.*token_ids != pad_id"),
        (moe(), torch.ones(T + 1, dtype=torch.bool), r"of shape \(12,\)"),
        (moe(), [True] * T, "token_mask must be a bool tensor"),
        (moe(), torch.ones(T, dtype=torch.bool, device="meta"), "one device"),
        (moe(sm.TokenRounding(tile=1)), torch.ones(T, dtype=torch.bool), "cannot be combined with TokenRounding"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(layer, mask, words):
    with pytest.raises((TypeError, ValueError), match=words):
        layer(torch.randn(T, H), token_mask=mask)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("router_dtype", [None, torch.float32, torch.float64])
def test_a_step_with_everything_waits_for_nothing_and_replays_in_a_graph(router_dtype):
    """Two micro-batches with padding, a checkpoint, and the update, captured together."""
    torch.manual_seed(0)
    sizes = (8, 2, 64, 32, "swiglu", True, 0.1)
    layer = sm.MoE(
        *sizes, router="sigmoid_grouped_topk", z_loss_weight=0.1, router_dtype=router_dtype,
        device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 100, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(2, 100, device="cuda") < 0.7

    def step(layer: sm.MoE) -> None:
        for reentrant in (False, True):
            given = x[int(reentrant)].detach().requires_grad_()
            real = mask[int(reentrant)]
            call = functools.partial(layer, token_mask=real)
            out, aux_loss = checkpoint(call, given, use_reentrant=reentrant, preserve_rng_state=False)
            (out.float().square().sum() + aux_loss).backward()
        sm.update_correction_bias(layer, 1e-3)

    def reset(layer: sm.MoE) -> None:
        layer.correction_bias.zero_()
        layer.counts_since_update.zero_()
        layer.zero_grad(set_to_none=True)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(layer)  # compiles
        step(twin)
    torch.cuda.current_stream().wait_stream(side)
    reset(layer)
    reset(twin)
    with no_host_waits():
        step(twin)
        step(twin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layer)
    reset(layer)
    graph.replay()
    graph.replay()
    assert layer.correction_bias.ne(0).any()
    assert torch.equal(layer.correction_bias, twin.correction_bias)
    assert not layer.counts_since_update.any()
