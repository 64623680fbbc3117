"""Experts of FP8 checkpoints: the inference operator where it can, dequantized weights where it cannot; whole
checkpoints as they are, and trained from BF16 weights.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_checkpoints import E, H, T, checkpoint, exact, experts, inputs
from held_choices import HeldChoices
from host_waits import no_host_waits
from oracle import rel_fro
from torch import Tensor, nn
from transformers import FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers_models import tokens, with_gradients

import supersonic_moe as sm
from supersonic_moe.inference import moe_fp8_topk
from supersonic_moe.integrations.transformers import fp8, served


def from_dequantized(module: Any, x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    """In fp64, with the module's own gate."""
    w1, _, w2, _ = fp8.dequantized(module, torch.float64)
    out = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for e, score in zip(ids[t].tolist(), scores[t].double(), strict=True):
            if e < E:
                z = w1[e] @ x[t].double()
                a = module._apply_gate(z[None])[0] if module.has_gate else module.act_fn(z)
                out[t] += score * (w2[e] @ a)
    return out


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("limit", [None, 3.0])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_the_operator_runs_with_the_modules_scales_and_limit(
    scale_fmt: str, limit: float | None, positive: bool
) -> None:
    module = experts(scale_fmt, swiglu_limit=limit)
    x, ids, scores = inputs(positive=positive)
    ids[2, 1] = E  # a sentinel
    pow2 = scale_fmt == "ue8m0"
    with torch.no_grad():
        got = module(x, ids, scores.bfloat16())
        want = moe_fp8_topk(
            x, module.gate_up_proj, module.down_proj, module.gate_up_proj_scale_inv.float(),
            module.down_proj_scale_inv.float(), scores.bfloat16().float(), ids, gate_up_order="gate_up",
            swiglu_limit=limit, pow2_scales=pow2,
        )  # fmt: skip
    assert got.dtype is torch.bfloat16 and torch.equal(got, want)
    assert 1e-3 < rel_fro(got, from_dequantized(module, x, ids, scores.bfloat16())) < 0.07
    assert served(module)[0].by == "the FP8 inference operator"


SLOW = {
    "alpha": ({"swiglu_alpha": 1.702, "swiglu_limit": 3.0}, "its gate is not SwiGLU"),
    "up + 1": ({"swiglu_alpha": 1.0, "swiglu_limit": 3.0}, "its gate is not SwiGLU"),
    "gelu": ({"hidden_act": "gelu"}, "its gate is not SwiGLU"),
    "mish": ({"hidden_act": "mish"}, "its gate is not SwiGLU"),
    "no gate": ({"has_gate": False, "hidden_act": "relu2"}, "its experts have no gate"),
    "static scales": ({"scheme": "static"}, "its activation scales are static"),
    "one scale a tensor": ({"block_size": None}, "its scales are not those of blocks of 128 x 128"),
    "other blocks": ({"block_size": (64, 128)}, "its scales are not those of blocks of 128 x 128"),
    "sizes": ({"moe_intermediate_size": 96}, "I of 64"),
}


@pytest.mark.parametrize("case", SLOW)
def test_what_the_operator_cannot_do_is_dequantized_and_said(case: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, why = SLOW[case]
    module = experts(**changes)
    fp8.warn_of_slow_path.cache_clear()
    x, ids, scores = inputs()
    for _ in range(2):
        got = module(x, ids, scores)
    assert rel_fro(got, from_dequantized(module, x, ids, scores)) < 8e-3
    assert [why in record.getMessage() for record in caplog.records if "dequantized" in record.getMessage()] == [True]
    (line,) = served(module)
    assert line.served and "dequantized" in line.by and why in line.why


@pytest.mark.parametrize("intermediate", [64, 96, 128])
def test_gate_and_up_are_dequantized_by_scales_of_their_own(intermediate: int) -> None:
    """A checkpoint has two weights with blocks of their own, of which the library joins codes and scales."""
    module: Any = experts(moe_intermediate_size=intermediate)
    scale_E2B = module.gate_up_proj_scale_inv
    assert scale_E2B.shape[1] == 2
    halves = zip(module.gate_up_proj.chunk(2, 1), scale_E2B.chunk(2, 1), strict=True)
    want = torch.cat([w.double() * scale.double().repeat_interleave(128, 2) for w, scale in halves], 1)
    w1, *_ = fp8.dequantized(module, torch.float64)
    torch.testing.assert_close(w1, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("act", ["silu", "mish"])
def test_inputs_in_any_strides(act: str) -> None:
    module = experts(hidden_act=act)
    x, ids, scores = inputs()
    turned = [t.t().contiguous().t() for t in (x, ids, scores)]
    with torch.no_grad():
        assert torch.equal(module(*turned), module(x, ids, scores))
        rows = x[:1].expand(T, H)
        assert torch.equal(module(rows, ids, scores), module(rows.contiguous(), ids, scores))


def test_gradients_of_hidden_states_pass_through_frozen_experts() -> None:
    """Adapters on attention: a gradient in fp32 is that of the dequantized weights."""
    module = experts()
    x, ids, scores = (t.requires_grad_() if t.is_floating_point() else t for t in inputs(torch.float32))
    w1, _, w2, _ = fp8.dequantized(module, torch.float32)
    dout = torch.randn(T, H)
    found = [
        torch.autograd.grad(out, (x, scores), dout)
        for out in (module(x, ids, scores), sm.topk_experts(x, ids, scores, w1, w2, layout="gate_up"))
    ]
    torch.testing.assert_close(*found)


def test_weights_that_the_quantizer_left_alone_are_16_bit_experts() -> None:
    """Sizes that are no multiple of a block stay in BF16, one projection or both."""
    module, one = experts(moe_intermediate_size=64), experts(moe_intermediate_size=64)
    module.gate_up_proj = nn.Parameter(torch.randn(E, 128, H).bfloat16() / 16)
    module.down_proj = nn.Parameter(torch.randn(E, H, 64).bfloat16() / 8)
    one.down_proj = module.down_proj
    x, ids, scores = inputs()
    want = sm.topk_experts(x, ids, scores, module.gate_up_proj, module.down_proj, layout="gate_up")
    got = module(x, ids, scores)
    assert torch.equal(got, want) and got.requires_grad
    assert rel_fro(one(x, ids, scores), from_dequantized(one, x, ids, scores)) < 8e-3


def test_fp4_is_refused() -> None:
    module = experts(expert_dtype="fp4")
    (line,) = served(nn.ModuleDict({"experts": module}))
    assert not line.served and "must be float8_e4m3fn; got int8" in line.why
    with pytest.raises(NotImplementedError, match="must be float8_e4m3fn; got int8"):
        module(*inputs())


def test_compiles_in_one_graph() -> None:
    module = experts(swiglu_limit=7.0)
    given = inputs()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(*given), module(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("count", [1, 9, 64, 700])
def test_on_a_gpu(count: int, scale_fmt: str, limit: float | None) -> None:
    module = experts(scale_fmt, hidden_size=512, moe_intermediate_size=256, swiglu_limit=limit)
    given = inputs(tokens=count, hidden=512)
    with torch.no_grad():
        on_cpu, wanted = module(*given), exact(module, *given)
        module, given = module.cuda(), [t.cuda() for t in given]
        first = module(*given)
        with no_host_waits():
            again = module(*given)
    assert torch.equal(first, again)
    assert 1e-3 < rel_fro(first, wanted) < 0.06
    # Tensor cores add with fewer digits, so a code beside a tie may be its neighbour: of a single row up to 3 %.
    assert rel_fro(first, on_cpu) < (0.01 if count >= 64 else 0.04)


# ---- whole checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_a_checkpoint_runs_as_it_is(
    scale_fmt: str, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    if device.type == "cpu":  # where the library dequantizes whatever one asks for
        monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    exact_model: Any = checkpoint(tmp_path, scale_fmt)
    model = type(exact_model).from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map=str(device), experts_implementation="supersonic"
    )
    assert [layer.by for layer in served(model)] == ["the FP8 inference operator"] * 2
    exact_model.float().set_experts_implementation("eager")
    ids, held = tokens(), HeldChoices()
    with torch.no_grad():
        with held:
            wanted = exact_model(ids).logits
        with held.again():
            found = model(ids.to(device)).logits
    assert rel_fro(found.float(), wanted) < 0.03
    generated = model.generate(ids.to(device), max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[:, : ids.shape[1]].cpu(), ids)


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_a_checkpoint_is_trained_in_fp8_from_bf16_weights(scale_fmt: str, tmp_path: Path, device: torch.device) -> None:
    pytest.importorskip("accelerate")
    exact_model: Any = checkpoint(tmp_path, scale_fmt)
    model = type(exact_model).from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(dequantize=True, scale_fmt=scale_fmt),
        experts_implementation="supersonic_fp8",
    )
    for (name, p), q in zip(model.named_parameters(), exact_model.parameters(), strict=True):
        assert p.requires_grad and torch.equal(p, q), name
    exact_model.float()
    model, ids, held = model.to(device).train(), tokens(), HeldChoices()
    with held:
        wanted = with_gradients(exact_model, "eager", ids)
    with held.again():
        found = with_gradients(model, "supersonic_fp8", ids.to(device))
    errors = {name: rel_fro(found[name].float(), wanted[name]) for name in wanted if "experts." in name}
    assert len(errors) == 4 and all(0.01 < error < 0.12 for error in errors.values()), errors

    before = copy.deepcopy(model.state_dict())
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert errors.keys() <= changed and all(p.dtype is torch.bfloat16 for p in model.parameters())
    with torch.no_grad(), held.again():
        again = model(ids.to(device), labels=ids.to(device)).loss
    assert again < found["loss"] - 0.05, (again, found["loss"])
