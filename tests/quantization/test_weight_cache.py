"""When an FP8 layer quantizes its weights: in every forward, unless the caller says that they stay as they are."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fp8_moe import E, H, I, K, T, experts_of, moe, step, tokens
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import supersonic_moe as sm
from supersonic_moe import Fp8Recipe
from supersonic_moe.kernels import reference
from supersonic_moe.quantization import weight_cache


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that were quantized so far."""
    calls: list[Tensor] = []

    def count(weights: Sequence[Tensor], pow2: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
        calls.extend(weights)
        return original(weights, pow2)

    original = reference.quantize_weights
    monkeypatch.setattr(reference, "quantize_weights", count)
    return calls


def fresh(layer: sm.MoE, x: Tensor) -> Tensor:
    """What a layer with these weights and no past gives."""
    other = moe(layer.recipe)
    for p, q in zip(other.parameters(), layer.parameters(), strict=True):
        p.data = q.data.clone()
    return other(x)[0].detach()  # type: ignore[no-any-return]


def optimizer_step(layer: sm.MoE, **options: Any) -> None:
    torch.optim.AdamW(layer.parameters(), lr=0.1, **options).step()


def assign(layer: sm.MoE) -> None:
    for w in experts_of(layer):
        w.data = 2 * w.data


def each(function: Callable[[Tensor], Any]) -> Callable[[sm.MoE], None]:
    def change(layer: sm.MoE) -> None:
        with torch.no_grad():
            for w in experts_of(layer):
                function(w)

    return change


def all_gather(w: Tensor) -> None:
    """FSDP2 writes into the unsharded weight like this."""
    with torch.autograd._unsafe_preserve_version_counter(w):
        w.copy_(2 * w)


SHOWN = {
    "optimizer": optimizer_step,
    "fused optimizer": lambda layer: optimizer_step(layer, fused=True),
    "in place": each(lambda w: w.mul_(2)),
    "load_state_dict": lambda layer: layer.load_state_dict({n: 2 * t for n, t in layer.state_dict().items()}),
    "load_state_dict, assigning": lambda layer: layer.load_state_dict(
        {n: 2 * t for n, t in layer.state_dict().items()}, assign=True
    ),
    "data assigned": assign,
}
HIDDEN = {
    "data copied": each(lambda w: w.data.copy_(2 * w.data)),
    "foreach on data": lambda layer: torch._foreach_mul_([w.data for w in experts_of(layer)], 2),
    "all-gather": each(all_gather),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", (SHOWN | HIDDEN).values(), ids=SHOWN | HIDDEN)
def test_no_change_of_a_weight_goes_unseen(change: Callable[[sm.MoE], None], grad: bool) -> None:
    layer, x = moe(), tokens()
    before = step(layer, x)
    with torch.set_grad_enabled(grad):
        layer(x)
        change(layer)
        after = layer(x)[0].detach()
    assert torch.equal(after, fresh(layer, x))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("change", (SHOWN | HIDDEN).values(), ids=SHOWN | HIDDEN)
def test_changes_while_weights_are_held(change: Callable[[sm.MoE], None]) -> None:
    """Most are seen even then; the others need ``invalidate``."""
    layer, x = moe(), tokens()
    with sm.constant_weights(layer):
        before = step(layer, x)
        change(layer)
        if change in HIDDEN.values():
            assert torch.equal(layer(x)[0], before), "seen after all: the table in weight_cache.py can promise more"
            layer.weight_cache.invalidate()
        assert torch.equal(layer(x)[0], fresh(layer, x))


def test_held_weights_are_quantized_once(quantized: list[Tensor]) -> None:
    layer, x = moe(), tokens()
    want = [step(layer, x) for _ in range(3)]
    assert len(quantized) == 6
    quantized.clear()
    with sm.constant_weights(layer):
        with sm.constant_weights(layer):
            got = [step(layer, x) for _ in range(2)]
        got.append(step(layer, x))
        with torch.no_grad():
            layer(x)
        checkpoint(layer, x, use_reentrant=False)[0].sum()
        assert len(quantized) == 2
        assert torch.equal(copy.deepcopy(layer)(x)[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with sm.constant_weights(layer):
        with torch.inference_mode():
            layer(x)
        step(layer, x)  # autograd cannot save tensors that inference mode made
    quantized.clear()
    step(layer, x)
    assert len(quantized) == 2
    with pytest.raises(KeyError), sm.constant_weights(layer):
        step(layer, x)
        raise KeyError
    quantized.clear()
    step(layer, x)
    assert len(quantized) == 2


def test_another_storage_at_the_same_address_is_quantized() -> None:
    """A weight was moved away, changed and moved back, and got the memory that it had."""
    memory = bytearray(16)
    weight = torch.nn.Parameter(torch.frombuffer(memory, dtype=torch.float32))
    cache, seen = weight_cache.WeightCache(), []

    def quantize(missing: Sequence[int]) -> list[weight_cache.Fp8Weight]:
        seen.append(weight.tolist())
        return [weight_cache.Fp8Weight(weight, None, weight)]

    with cache.hold():
        cache.get([weight], (), quantize)
        signs = weight_cache._signs(weight)
        weight.data = torch.empty(4)
        weight.data = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
        assert weight_cache._signs(weight) == signs
        cache.get([weight], (), quantize)
    assert seen == [[0.0] * 4, [1.0] * 4]


def test_weights_are_swapped_while_held() -> None:
    """``torch.utils.swap_tensors``, which modules use where ``set_swap_module_params_on_conversion`` is on."""
    layer, x = moe(), tokens()
    with sm.constant_weights(layer):
        before = step(layer, x)
        layer.zero_grad()
        for w in experts_of(layer):
            torch.utils.swap_tensors(w, torch.nn.Parameter(2 * w.detach()))
        after = step(layer, x)
        assert torch.equal(after, fresh(layer, x)) and not torch.equal(after, before)


def test_another_weight_at_the_same_address_or_other_options_are_quantized() -> None:
    """An allocator reuses memory. Then nothing but the object tells the new weight from the old one."""
    storage = torch.zeros(4).untyped_storage()
    first, second = (torch.empty(0).set_(storage, 0, (4,), (1,)) for _ in range(2))
    assert weight_cache._signs(first) == weight_cache._signs(second)
    cache, calls = weight_cache.WeightCache(), []

    def quantize(missing: Sequence[int]) -> list[weight_cache.Fp8Weight]:
        calls.append(missing)
        return [weight_cache.Fp8Weight(first, None, first)]

    with cache.hold():
        for weight, options, expected in ((first, (), 1), (first, (), 1), (second, (), 2), (second, ("pow2",), 3)):
            cache.get([weight], options, quantize)
            assert len(calls) == expected


def test_what_another_thread_drops_meanwhile_is_still_handed_out() -> None:
    """An optimizer may step, or another block end, while a weight is quantized."""
    cache, w = weight_cache.WeightCache(), [torch.zeros(2), torch.ones(2), torch.ones(2)]

    def quantize(missing: Sequence[int]) -> list[weight_cache.Fp8Weight]:
        if missing == [1]:
            cache.invalidate()
        return [weight_cache.Fp8Weight(w[0] + i, None, w[0]) for i in missing]

    with cache.hold():
        first, _ = cache.get(w[:2], (), quantize)
        again, second = cache.get([w[0], w[2]], (), quantize)
    assert again.q is first.q and second.q.tolist() == [1, 1]


def test_nothing_keeps_a_cache_after_its_block() -> None:
    cache = weight_cache.WeightCache()
    held = weakref.ref(cache)
    with cache.hold():
        pass
    del cache
    gc.collect()
    assert held() is None


def test_held_weights_follow_recipe_and_dtype(quantized: list[Tensor]) -> None:
    """One cache, several recipes and callers: what was quantized for one is not given to another."""
    layer, x = sm.MoE(E, K, H, I, "swiglu", True, 0.1, recipe=Fp8Recipe()), tokens()
    with sm.constant_weights(layer), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            layer(x)
        assert len(quantized) == 2, "the copies that autocast makes are new each time, the parameters are not"
        layer.recipe = Fp8Recipe(scale="pow2")
        powers = layer(x)[0]
        layer.recipe = Fp8Recipe()
        assert not torch.equal(layer(x)[0], powers)
    cache, (w1, w2) = sm.WeightCache(), (w.detach().bfloat16() for w in experts_of(layer))
    ids, scores = torch.randint(E, (T, K)), torch.rand(T, K)
    kwargs = dict(recipe=Fp8Recipe(), weight_cache=cache)
    quantized.clear()
    with cache.hold():
        for _ in range(2):
            sm.topk_experts(x, ids, scores, w1.mT.contiguous().mT, w2, **kwargs)
        assert len(quantized) == 3, "w1 was a new tensor each time"
        with torch.inference_mode():
            sm.topk_experts(x, ids, scores, w1.clone(), w2.clone(), **kwargs)
            sm.topk_experts(x, ids, scores, w1.clone(), w2.clone(), **kwargs)
        assert len(quantized) == 7, "no version counter"


@pytest.mark.gpu
def test_capture_quantizes_inside_the_graph() -> None:
    """Neither may a graph read a copy made before it, nor the cache keep one that replays overwrite."""
    cache = sm.WeightCache()
    w = torch.randn(2, 128, 128, device="cuda", dtype=torch.bfloat16)

    def get() -> Tensor:
        def quantize(which: Sequence[int]) -> Any:
            return [SimpleNamespace(q=w * 2) for _ in which]

        return cache.get([w], (), quantize)[0].q

    with cache.hold():
        eager = get()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = get()
        assert get() is eager
        assert captured is not eager
        w.data.add_(1)
        graph.replay()
        assert torch.equal(captured, w * 2)


def test_copies_made_under_fake_tensors_are_not_kept() -> None:
    layer, x = moe(Fp8Recipe()), tokens()
    expected = fresh(layer, x)
    with sm.constant_weights(layer):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(layer(mode.from_tensor(x))[0], FakeTensor)
        assert torch.equal(layer(x)[0], expected)


def test_weights_inside_a_transform_are_not_kept() -> None:
    layer, x = moe(Fp8Recipe()), tokens()
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = torch.func.grad(lambda w: torch.func.functional_call(layer, w, (x,))[0].float().square().sum())
    want = gradient(weights)
    with sm.constant_weights(layer):
        got = gradient(weights)
    assert all(torch.equal(got[name], want[name]) for name in weights)
