"""The module: SonicMoE compatibility, what is saved, autocast, compile, checkpointing, routers, state."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import supersonic_moe as sm
from supersonic_moe import ActivationType, KernelBackendMoE, MoE

T, H, I, E, K = 12, 16, 8, 4, 2  # noqa: E741


def layer(activation=ActivationType.SWIGLU, add_bias=False, **kwargs) -> MoE:
    return MoE(E, K, H, I, activation, add_bias, 0.5, **kwargs)


def saved_bytes(run) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(storages.values())


def test_sonicmoe_quick_start_runs_with_the_import_changed():
    moe = MoE(
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        intermediate_size=I,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    ).to(dtype=torch.bfloat16)
    x = torch.randn(3, 5, H, dtype=torch.bfloat16)
    output, aux_loss = moe(x, kernel_backend_moe=KernelBackendMoE.sonicmoe)
    assert output.shape == x.shape
    assert output.dtype == torch.bfloat16
    assert aux_loss.dim() == 0
    inference, none = moe(x, is_inference_mode=True)
    assert none is None
    assert torch.equal(inference, output)
    assert set(moe.state_dict()) == {"router.weight", "c_fc.weight", "c_proj.weight"}
    assert moe.c_fc.weight.shape == (E, 2 * I, H)
    assert moe.c_proj.weight.shape == (E, H, I)
    assert set(layer("gelu", add_bias=True).state_dict()) - set(moe.state_dict()) == {"c_fc.bias", "c_proj.bias"}
    assert [a.value for a in ActivationType][:7] == ["swiglu", "geglu", "reglu", "relu_sq", "relu", "gelu", "silu"]


@pytest.mark.parametrize(("activation", "fan"), [("swiglu", 2), ("relu_sq", 1)])
def test_saved_bytes_equal_the_formula(activation, fan):
    """x and the pre-activation (2TH + 4RI bytes when gated), scores and int32 metadata; nothing in inference mode."""
    moe = layer(activation).to(torch.bfloat16)
    x = torch.randn(T, H, dtype=torch.bfloat16)
    ids, scores = torch.randint(E, (T, K), dtype=torch.int32), torch.rand(T, K, requires_grad=True)
    plan = sm.plan_from_topk(ids, E)
    rows = T * K
    metadata = 4 * (E + 1) + 4 * rows * 4 + 4 * rows  # offsets; gather, scatter, row_expert, reverse; scores
    weights = 2 * (moe.c_fc.weight.numel() + moe.c_proj.weight.numel())

    def run(inference):
        w1, w2 = moe.c_fc.weight, moe.c_proj.weight
        sm.experts_from_plan(x, scores.flatten(), plan, w1, w2, activation=activation, inference=inference)

    assert saved_bytes(lambda: run(False)) - weights == 2 * T * H + 2 * rows * fan * I + metadata
    assert saved_bytes(lambda: run(True)) == 0


def test_aux_loss_is_switch_plus_weighted_z_loss():
    moe, x = layer(z_loss_weight=0.5), torch.randn(T, H)
    _, aux = moe(x)
    logits = x @ moe.router.weight.T
    probs = torch.softmax(logits, 1).sum(0)
    counts = torch.bincount(logits.topk(K).indices.flatten(), minlength=E)
    assert moe.expert_counts.tolist() == counts.tolist()
    want = E * (probs / probs.sum() * counts / counts.sum()).sum() + 0.5 * torch.logsumexp(logits, 1).square().mean()
    torch.testing.assert_close(aux, want)
    (grad,) = torch.autograd.grad(aux, moe.router.weight)
    assert grad.abs().max() > 0


def test_a_compiled_forward_leaves_counts_of_an_earlier_one_alone():
    moe, x, y = layer(), torch.randn(T, H), torch.randn(T, H)
    _, aux, routing = moe(x, return_routing=True)
    counts, (want,) = routing.expert_counts.clone(), torch.autograd.grad(aux, moe.router.weight, retain_graph=True)
    _, another = moe(x)
    torch.compile(moe, backend="aot_eager")(y)
    assert moe.expert_counts.ne(counts).any() and torch.equal(routing.expert_counts, counts)
    for loss in (aux, another):
        assert torch.equal(torch.autograd.grad(loss, moe.router.weight)[0], want)


def test_router_learns_through_the_scores():
    moe, x = layer(), torch.randn(T, H)
    out, _ = moe(x)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in moe.parameters())


def test_autocast_computes_in_bf16_and_returns_fp32_gradients():
    moe, x = layer(add_bias=True), torch.randn(T, H, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, aux = moe(x)
        (out.float().square().sum() + aux).backward()
    low = copy.deepcopy(moe).to(torch.bfloat16)
    want, _ = low(x.detach().bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


@pytest.mark.parametrize("router_dtype", [None, torch.float32])
def test_autocast_leaves_fp64_as_it_is(router_dtype):
    """As every operator of torch does: a layer in fp64 has the same bits under autocast."""
    moe = layer(router_dtype=router_dtype, dtype=torch.float64)
    results = []
    for enabled in (False, True):
        x = torch.linspace(-1, 1, T * H, dtype=torch.float64).sin().view(T, H).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, aux = moe(x)
            y = sm.grouped_linear(x, moe.c_fc.weight, torch.full((E,), T))
        (out.square().sum() + aux + y.sum()).backward()
        results.append([out, aux, y, x.grad])
    for plain, got in zip(*results, strict=True):
        assert got.dtype == plain.dtype and torch.equal(got, plain)


@pytest.mark.parametrize("router", ["softmax_after_topk", "sigmoid_grouped_topk"])
def test_compile_fullgraph_with_changing_token_count(router):
    moe = layer(router=router, add_bias=True)
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(tokens, H)
        results = []
        for f in (moe, compiled):
            moe.zero_grad()
            y = x.clone().requires_grad_()
            out, aux = f(y)
            (out.square().sum() + aux).backward()
            results.append([out, y.grad, *(p.grad for p in moe.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)


def test_a_compiled_layer_is_not_taken_for_another_of_its_sizes():
    """Layers that are compiled one by one share the compiler's cache, and differ in what no tensor shows."""
    torch._dynamo.reset()
    x, weights, seen = torch.randn(T, H), layer().state_dict(), []
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=20):
        for options in (
            dict(),
            dict(activation="geglu"),
            dict(activation="geglu_tanh"),
            dict(activation=sm.Activation.swiglu_clamped(0.1)),
            dict(activation=sm.Activation.swiglu_clamped(0.05)),
            dict(layout="gate_up"),
            dict(router="softmax_before_topk"),
        ):
            moe = layer(**options)
            moe.load_state_dict(dict(weights))
            want = moe(x)[0]
            moe.compile(fullgraph=True, backend="eager")
            assert torch.equal(moe(x)[0], want)
            assert not any(torch.equal(want, other) for other in seen)
            seen.append(want)


@pytest.mark.parametrize("mode", ["NR-f", "SR-f"])
def test_checkpointing_recomputes_the_same_routing(mode):
    """Sampled token rounding draws from torch's generator, whose state checkpointing restores."""
    moe = layer(router=sm.TokenRounding(mode=mode, tile=4))
    x = torch.randn(64, H)

    def grads(wrap):
        torch.manual_seed(3)
        moe.zero_grad()
        y = x.clone().requires_grad_()
        out, _ = checkpoint(moe, y, use_reentrant=False) if wrap else moe(y)
        out.square().sum().backward()
        return [y.grad, *(p.grad.clone() for p in moe.parameters())]

    for got, want in zip(grads(True), grads(False), strict=True):
        assert torch.equal(got, want)


def test_token_rounding_rounds_in_training_only():
    torch.manual_seed(1)
    moe = layer(router=sm.TokenRounding(tile=8))
    x = torch.randn(64, H)
    moe(x)
    assert (moe.expert_counts % 8 == 0).all()
    moe.eval()
    out, _ = moe(x)
    assert moe.expert_counts.sum() == 64 * K
    plain = layer()
    plain.load_state_dict(moe.state_dict())
    assert torch.equal(out, plain(x)[0])


def test_correction_bias_steers_the_choice_and_not_the_scores():
    moe = layer(router=sm.SigmoidGroupedTopK(scaling_factor=2.5))
    x = torch.randn(T, H)
    moe.correction_bias[3] = 100.0
    moe(x)
    assert moe.expert_counts[3] == T
    scores, ids = sm.route(x @ moe.router.weight.T, K, moe.routing, correction_bias=moe.correction_bias)
    assert (ids == 3).any(1).all()
    torch.testing.assert_close(scores.sum(1), torch.full((T,), 2.5))
    assert "correction_bias" in moe.state_dict()


def test_correction_bias_stays_in_fp32():
    moe = layer(router="sigmoid_grouped_topk")
    moe.correction_bias += 0.5 + 1e-4
    moe.to(torch.bfloat16)
    assert moe.router.weight.dtype == torch.bfloat16
    assert moe.correction_bias.dtype == torch.float32
    assert (moe.correction_bias == torch.tensor(0.5 + 1e-4)).all()
    moe(torch.randn(T, H, dtype=torch.bfloat16))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("recipe", [None, sm.Fp8Recipe()])
def test_export_with_any_number_of_tokens(recipe, inference):
    """Also saved, loaded and decomposed, for which a program may change no tensor that is no buffer. Inference in FP8
    has another way for few rows, sizes of whole blocks and Hopper.
    """
    moe = MoE(E, K, 128, 128, "swiglu", False, 0.1, router="sigmoid_grouped_topk", recipe=recipe, dtype=torch.bfloat16)
    options = {"is_inference_mode": inference}
    tokens = {"hidden_states": {0: torch.export.Dim("tokens", max=4096)}, "is_inference_mode": None}
    program = torch.export.export(moe.eval(), (torch.randn(T, 128).bfloat16(),), options, dynamic_shapes=tokens)
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    for found in (program, torch.export.load(file), program.run_decompositions()):
        for tokens in (T, 32 * E + 1):
            x = torch.randn(tokens, 128).bfloat16()
            assert torch.equal(found.module()(x, **options)[0], moe(x, **options)[0])


@pytest.mark.parametrize("router", ["softmax_after_topk", "sigmoid_grouped_topk"])
def test_compile_fullgraph_around_a_checkpoint(router):
    """No attribute may be set in there, so counts are kept in place."""
    moe = layer(router=router, add_bias=True)

    def grads(run):
        moe.zero_grad()
        y = x.clone().requires_grad_()
        out, aux = run(y)
        (out.square().sum() + aux).backward()
        return [out, y.grad, moe.expert_counts.clone(), *(p.grad for p in moe.parameters())]

    x = torch.randn(9, H)
    want = grads(moe)
    compiled = torch.compile(
        lambda x: checkpoint(moe, x, use_reentrant=False), fullgraph=True, backend="aot_eager", dynamic=True
    )
    moe.expert_counts.zero_()
    for got, expected in zip(grads(compiled), want, strict=True):
        torch.testing.assert_close(got, expected)
    if moe.counts_since_update is not None:
        assert moe.counts_since_update.sum() == 2 * 9 * K


VIEWS = {
    "batch 1 transposed": lambda x: x.view(1, H, T).transpose(1, 2),
    "batch 2 transposed": lambda x: x.view(2, H, T // 2).transpose(1, 2),
    "2-D transposed": lambda x: x.view(H, T).t(),
    "expanded rows": lambda x: x[:1].expand(5, H),
    "expanded batch": lambda x: x[:1].expand(5, 1, H),
    "expanded columns": lambda x: x[:, :1].expand(T, H),
    "every other column": lambda x: torch.cat([x, x], 1)[:, ::2],
    "rows that overlap": lambda x: x.flatten().as_strided((T - 1, H), (3, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_view_is_an_input(view):
    moe, x = layer(), torch.randn(T, H)
    results = []
    for copied in (False, True):
        y = x.clone().requires_grad_()
        given = VIEWS[view](y)
        out, aux = moe(given.clone(memory_format=torch.contiguous_format) if copied else given)
        (out.square().sum() + aux).backward()
        results.append((out, aux, y.grad))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_meta_device():
    """Shapes of a forward without its data."""
    moe = layer(router="sigmoid_grouped_topk", device="meta")
    x = torch.randn(3, 5, H, device="meta", requires_grad=True)
    out, aux = moe(x)
    (out.sum() + aux).backward()
    assert out.shape == x.shape and out.is_meta and x.grad.shape == x.shape
    assert moe.expert_counts.is_meta


@pytest.mark.parametrize("how", ["reset", "each part"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_the_meta_device_as_from_the_constructor(how, dtype):
    args = dict(add_bias=True, router="sigmoid_grouped_topk")
    moe = layer(**args, device="meta", dtype=dtype)
    assert all(p.is_meta and p.dtype is dtype for p in moe.parameters())
    moe.to_empty(device="cpu")
    assert not moe.correction_bias.any() and not moe.counts_since_update.any() and not moe.expert_counts.any()
    for value in (*moe.parameters(), moe.correction_bias, moe.counts_since_update, moe.expert_counts):
        value.data.fill_(77)
    torch.manual_seed(5)
    if how == "reset":
        moe.reset_parameters()
    else:
        for module in (moe.router, moe.c_fc, moe.c_proj):
            module.reset_parameters()
        moe.correction_bias.zero_()
    torch.manual_seed(5)
    made = layer(**args, dtype=dtype)
    for (name, got), want in zip(moe.state_dict().items(), made.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert moe.correction_bias.dtype is torch.float32
    if how == "reset":
        assert not moe.counts_since_update.any() and not moe.expert_counts.any()


def test_router_has_the_standard_deviation_that_was_asked_for():
    moe = sm.MoE(64, 2, 256, I, "swiglu", False, 0.5, device="meta").to_empty(device="cpu")
    for module in moe.modules():
        module.reset_parameters()  # as FSDP2's recipes do
    for weight in moe.parameters():
        assert weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_a_router_of_parts_is_reset_part_by_part():
    moe = layer()
    moe.router = torch.nn.Sequential(torch.nn.Linear(H, 4), torch.nn.Tanh(), torch.nn.Linear(4, E))
    for parameter in moe.parameters():
        torch.nn.init.constant_(parameter, 77)
    moe.reset_parameters()
    assert all(parameter.abs().max() < 7 for parameter in moe.parameters())


def test_skip_init():
    moe = torch.nn.utils.skip_init(
        MoE, E, K, H, I, "swiglu", True, 0.5, router="sigmoid_grouped_topk", device="cpu", dtype=torch.float64
    )
    moe.load_state_dict(layer(add_bias=True, router="sigmoid_grouped_topk").state_dict())
    moe(torch.randn(T, H, dtype=torch.float64))
    assert moe.counts_since_update.sum() == T * K


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_router_dtype(router_dtype, autocast):
    """Beside experts in BF16 logits are those of the exact operands, and so are choices that BF16 leaves to chance."""
    torch.manual_seed(2)
    moe = MoE(32, 4, H, I, "swiglu", False, 0.5, router_dtype=router_dtype, dtype=None if autocast else torch.bfloat16)
    x = torch.randn(2048, H, dtype=torch.float32 if autocast else torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, aux, routing = moe(x, return_routing=True)
        (out.float().square().sum() + aux + routing.router_logits.square().sum()).backward()
    exact = x.detach().double() @ moe.router.weight.detach().double().T
    assert out.dtype == torch.bfloat16 and routing.router_logits.dtype == router_dtype
    torch.testing.assert_close(routing.router_logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(routing.expert_ids.sort(1).values, exact.topk(4).indices.sort(1).values.int())
    fourth, fifth = exact.bfloat16().topk(5).values[:, 3:].unbind(1)
    assert (fourth == fifth).sum() > 8
    assert x.grad.dtype == x.dtype and moe.router.weight.grad.dtype == moe.router.weight.dtype


def test_gradients_of_logits_in_another_dtype():
    """The definition is F.linear of converted operands; second derivatives come with it."""
    from supersonic_moe.training.router_linear import linear_in

    x, w = torch.randn(T, H, requires_grad=True), torch.randn(E, H, requires_grad=True)
    results = []
    for project in (linear_in, lambda x, w, dtype: torch.nn.functional.linear(x.to(dtype), w.to(dtype))):
        loss = project(x, w, torch.float64).sin().sum()
        grads = torch.autograd.grad(loss, (x, w), create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w))])
    for got, want in zip(*results, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want)


def test_print_shows_router_and_recipe():
    text = repr(
        layer(router=sm.SigmoidGroupedTopK(scaling_factor=2.5), recipe=sm.Fp8Recipe(), router_dtype=torch.float32)
    )
    for part in (
        "SigmoidGroupedTopK(",
        "scaling_factor=2.5",
        "recipe=Fp8Recipe(",
        "num_experts=4",
        "logits_dtype=torch.float32",
    ):
        assert part in text
    moe = layer()
    moe.layout, moe.activation = "gate_up", "geglu"  # as in the constructor
    moe(torch.randn(T, H))
    assert "layout=gate_up" in repr(moe) and "activation=geglu" in repr(moe)


def test_eval_mode_still_gives_gradients():
    """Fine-tuning may run in eval(): only torch.no_grad and is_inference_mode drop the gradients."""
    moe = layer().eval()
    out, _ = moe(torch.randn(T, H))
    out.sum().backward()
    assert moe.c_fc.weight.grad is not None
    with torch.no_grad():
        assert not moe(torch.randn(T, H))[0].requires_grad


def test_noncontiguous_and_expanded_output_gradients():
    moe, x = layer(), torch.randn(T, H, requires_grad=True)
    out, _ = moe(x)
    (expanded,) = torch.autograd.grad(out.sum(), x, retain_graph=True)  # gradient with stride 0
    (dense,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(expanded, dense)


def test_higher_level_copies():
    moe = layer(add_bias=True)
    twin = copy.deepcopy(moe)
    x = torch.randn(T, H)
    assert torch.equal(moe(x)[0], twin(x)[0])
    assert "num_experts=4" in repr(moe)


def test_a_checkpoint_whose_gate_and_up_lie_otherwise_is_refused():
    """Its rows have the shape that the layer wants, and mean something else."""
    saved, file = torch.nn.Sequential(layer(layout="gate_up")), io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    with pytest.raises(RuntimeError, match=r"0\.c_fc was saved by a layer with layout='gate_up'.*layout='interleaved'"):
        torch.nn.Sequential(layer()).load_state_dict(state)
    fits, other = torch.nn.Sequential(copy.deepcopy(saved[0])), torch.nn.Sequential(layer())
    torch.nn.init.zeros_(fits[0].c_fc.weight)
    fits.load_state_dict(state)
    rows = state["0.c_fc.weight"].view(E, 2, I, H)
    state["0.c_fc.weight"] = rows.transpose(1, 2).reshape(E, 2 * I, H)
    other.load_state_dict(dict(state))
    x = torch.randn(T, H)
    want = saved(x)[0]
    assert torch.equal(fits(x)[0], want)
    torch.testing.assert_close(other(x)[0], want)


def test_every_public_name_resolves_and_help_does_not_import_torch():
    for name in sm.__all__:
        assert getattr(getattr(sm, name), "__name__", name) == name
    with pytest.raises(AttributeError, match="no attribute 'Moe'"):
        _ = sm.Moe
    code = "import sys, supersonic_moe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": "src"})
