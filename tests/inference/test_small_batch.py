"""The FP8 layer in inference mode with few rows: which calls take the operator for serving, and that it computes what
the layer computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import supersonic_moe as sm
from supersonic_moe.config.activation import Activation
from supersonic_moe.config.recipe import Bf16Recipe, Fp8Recipe
from supersonic_moe.inference import small_batch
from supersonic_moe.training.options import Options

E, H, INTER, K = 6, 256, 128, 3
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU counts as a GPU of whose kernels the reference is the definition."""
    monkeypatch.setattr(small_batch, "_on_hopper", lambda x, inter, backend: True)


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[int]:
    """Calls that go through the operator; a CPU counts as a GPU of whose kernels the reference is the definition."""
    if device.type == "cuda" and not HOPPER:
        pytest.skip("FP8 needs a Hopper GPU")
    if device.type == "cpu":
        monkeypatch.setattr(small_batch, "_on_hopper", lambda x, inter, backend: True)
    monkeypatch.setattr(small_batch, "streams", lambda rows, expected, hidden, inter, experts: rows <= 30 * experts)
    calls, run = [], small_batch.run

    def counted(x: Tensor, *rest: Any) -> Tensor:
        calls.append(x.shape[0])
        return run(x, *rest)

    monkeypatch.setattr(small_batch, "run", counted)
    return calls


def operands(device: torch.device, tokens: int = 17) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    return {"x": normal(tokens, H), "w1": normal(E, 2 * INTER, H) * 0.1, "w2": normal(E, H, INTER) * 0.1}


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def check(got: Tensor, layer: Tensor, exact: Tensor) -> None:
    """No worse than the layer, which rounds more: where A was rounded to bf16, one code in ten turns over (0.012)."""
    assert relative_error(got, exact) <= 1.02 * relative_error(layer, exact) <= 0.07
    assert relative_error(got, layer) <= 0.02


@pytest.mark.parametrize(
    ("change", "suited"),
    [
        ({}, True),
        ({"activation": Activation.swiglu_clamped(1.0)}, True),
        ({"inference": False}, False),
        ({"recipe": None}, False),
        ({"activation": Activation.gpt_oss()}, False),
        ({"activation": "geglu"}, False),
        ({"b1": torch.zeros(E, 2 * INTER)}, False),
        ({"b2": torch.zeros(E, H)}, False),
    ],
)
def test_which_calls_it_suits(on_hopper: None, change: dict[str, Any], suited: bool) -> None:
    options = Options.read({"recipe": Fp8Recipe(), "inference": True, **change})  # type: ignore[typeddict-item]
    made = operands(torch.device("cpu"), tokens=2)
    assert small_batch.suits(made["x"], made["w1"], made["w2"], K, options) is suited


def test_sizes_that_it_suits(on_hopper: None) -> None:
    options = Options(recipe=Fp8Recipe(), inference=True)

    def suits(tokens: int, hidden: int = 256, inter: int = 512, experts: int = 6, choices: int = 3) -> bool:
        meta = {"device": "meta", "dtype": torch.bfloat16}
        w1, w2 = torch.empty(experts, 2 * inter, hidden, **meta), torch.empty(experts, hidden, inter, **meta)
        return small_batch.suits(torch.empty(tokens, hidden, **meta), w1, w2, choices, options)

    assert suits(1) and suits(128) and not suits(129) and not suits(0)  # 64 rows an expert
    assert suits(529, hidden=7168, experts=256) and not suits(530, hidden=7168, experts=256)  # 6 rows
    assert not suits(4, hidden=192) and not suits(4, inter=192)
    assert suits(4, experts=512) and not suits(4, experts=513)
    assert suits(4, choices=16) and not suits(4, choices=17)


def test_a_cpu_keeps_the_layer_as_it_is() -> None:
    made = operands(torch.device("cpu"))
    options = Options(recipe=Fp8Recipe(), inference=True)
    assert not small_batch.suits(made["x"], made["w1"], made["w2"], K, options)


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
@pytest.mark.parametrize("layout", ["gate_up", "up_gate", "interleaved"])
def test_topk_experts_as_the_layer(few_rows: list[int], layout: str, scale: str, device: torch.device) -> None:
    made = operands(device)
    x, w1, w2 = made.values()
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(17)]).to(device)
    ids[0], ids[1, 1] = -1, E  # sentinels
    scores = torch.rand(17, K, device=device)
    options: Any = {"recipe": Fp8Recipe(scale=scale), "layout": layout, "activation": Activation.swiglu_clamped(2.0)}
    layer = sm.topk_experts(x, ids, scores, w1, w2, **options)
    exact = sm.topk_experts(x.double(), ids, scores, w1.double(), w2.double(), **{**options, "recipe": None})
    assert few_rows == []
    got = sm.topk_experts(x, ids, scores, w1, w2, inference=True, **options)
    assert few_rows == [17]
    assert got.dtype is torch.bfloat16 and not got.requires_grad and not got[0].any()
    check(got, layer, exact)


def test_the_module_in_inference_mode(few_rows: list[int], device: torch.device) -> None:
    torch.manual_seed(0)
    moe = sm.MoE(E, K, H, INTER, "swiglu", add_bias=False, std=0.05, recipe=Fp8Recipe()).to(device, torch.bfloat16)
    x = torch.randn(3, 5, H, device=device).bfloat16()
    layer, _ = moe(x)
    counts = moe.expert_counts
    moe.recipe = Bf16Recipe()
    exact, _ = moe(x)
    moe.recipe = Fp8Recipe()
    got, aux = moe(x, is_inference_mode=True)
    assert few_rows == [15] and aux is None and got.shape == x.shape
    check(got, layer, exact)
    assert moe.expert_counts is not None and counts is not None
    assert moe.expert_counts.dtype is torch.int32 and torch.equal(moe.expert_counts, counts)
    many = torch.randn(200, H, device=device).bfloat16()
    moe(many, is_inference_mode=True)
    assert few_rows == [15]


def test_weights_are_quantized_once_while_they_are_constant(
    few_rows: list[int], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    moe = sm.MoE(E, K, H, INTER, "swiglu", add_bias=False, std=0.05, recipe=Fp8Recipe()).to(device, torch.bfloat16)
    x, seen = torch.randn(4, H, device=device).bfloat16(), []
    copies = small_batch.with_fp8_copies

    def watched(*arguments: Any) -> Any:
        quantized = copies(*arguments)
        seen.append(quantized[0].fp8.q.data_ptr())
        return quantized

    monkeypatch.setattr(small_batch, "with_fp8_copies", watched)
    with sm.constant_weights(moe):
        first, _ = moe(x, is_inference_mode=True)
        again, _ = moe(x, is_inference_mode=True)
    assert len(seen) == 2 and len(set(seen)) == 1 and torch.equal(first, again)


def test_repeated_ids_are_found_when_asked_for(few_rows: list[int], device: torch.device) -> None:
    made = operands(device, tokens=2)
    ids = torch.tensor([[0, 1, 2], [3, 3, 4]], device=device)
    with pytest.raises(ValueError, match="must not name an expert twice"):
        sm.topk_experts(
            made["x"], ids, torch.rand(2, 3, device=device), made["w1"], made["w2"], recipe=Fp8Recipe(), inference=True,
            validate=True,
        )  # fmt: skip


def test_padding_goes_nowhere(few_rows: list[int], device: torch.device) -> None:
    x, w1, w2 = operands(device, tokens=6).values()
    router = torch.randn(E, H, device=device).bfloat16() * 0.1
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    x[~mask] = torch.nan
    common: Any = {"token_mask_T": mask, "recipe": Fp8Recipe()}
    layer = sm.moe_layer(x, router, w1, w2, K, **common)
    got = sm.moe_layer(x, router, w1, w2, K, inference=True, **common)
    assert few_rows == [6]
    assert torch.equal(got.expert_counts, layer.expert_counts) and int(got.expert_counts.sum()) == 4 * K
    assert not got.output[~mask].any() and relative_error(got.output, layer.output) <= 0.02
