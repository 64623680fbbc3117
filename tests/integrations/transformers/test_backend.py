"""The experts backend beside its classes (``test_classes.py``): registration, gates that nobody knows, sentinels,
dtypes, autocast, checkpointing, the compiler.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import sys
import weakref
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from compiled_graphs import Graphs
from oracle import rel_fro
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from transformers_experts import (
    CHOICES,
    EXPERTS,
    HIDDEN,
    TOKENS,
    decorated_classes,
    inputs,
    outputs_and_gradients,
    random_experts,
)

import supersonic_moe as sm
from supersonic_moe.integrations.transformers import backend, constant_weights, gates, held_weights, register
from supersonic_moe.quantization.weight_cache import WeightCache

CLASSES = decorated_classes()


# ---- registration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    for functions in (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS):
        monkeypatch.setattr(type(functions), "_global_mapping", dict(functions._global_mapping))


@pytest.mark.usefixtures("registries")
def test_names_are_in_both_registries_and_may_be_registered_again() -> None:
    for name in ("supersonic", "supersonic_fp8"):
        assert name in ALL_EXPERTS_FUNCTIONS and name in ALL_FP8_EXPERTS_FUNCTIONS
    register("supersonic")
    register("mine", recipe=sm.Fp8Recipe(wgrad="bf16"))
    assert ALL_EXPERTS_FUNCTIONS["mine"].keywords == {"recipe": sm.Fp8Recipe(wgrad="bf16")}


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("taken", [ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS], ids=lambda r: type(r).__name__)
def test_a_taken_name_is_refused_and_nothing_is_replaced(taken: Any) -> None:
    def theirs() -> None: ...

    taken.register("other", theirs)
    with pytest.raises(ValueError, match="must be free or ours; 'other' in ALL_"):
        register("other")
    with pytest.raises(ValueError, match="must be free or ours; 'supersonic' in ALL_EXPERTS"):
        register("supersonic", recipe=sm.Fp8Recipe())
    both = (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)
    assert [functions["other"] for functions in both if "other" in functions] == [theirs]


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("name", ["eager", "", None])
def test_what_is_no_name_of_a_backend_is_refused(name: Any) -> None:
    """The library looks "eager" up as any other name, and would run ours for it from then on."""
    before = dict(ALL_EXPERTS_FUNCTIONS)
    with pytest.raises((TypeError, ValueError), match="the name of an experts backend must be"):
        register(name)
    assert dict(ALL_EXPERTS_FUNCTIONS) == before


@pytest.mark.usefixtures("registries")
def test_versions(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend.transformers, "__version__", "5.16.2")
    with pytest.raises(ImportError, match=r"needs Transformers 5\.17 or newer; got 5\.16\.2"):
        register("mine")
    monkeypatch.setattr(backend.transformers, "__version__", "5.18.0")
    for _ in range(2):
        register("mine")
    assert [r.message for r in caplog.records if "5.18.0 is newer" in r.message] == [caplog.records[0].message]


@pytest.mark.parametrize("version", ["4.57.1", None])
def test_a_library_without_our_modules_is_refused_in_a_sentence(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = "supersonic_moe.integrations.transformers"
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    missing = "transformers" if version is None else "transformers.integrations.finegrained_fp8"
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"needs Transformers 5\.17 or newer; got {version or 'none'} \(import of"):
        importlib.import_module(ours)


# ---- gates that nobody knows -----------------------------------------------------------------------------------------


def swish_of_both(self: nn.Module, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return torch.tanh(gate) * self.act_fn(up)


def experts_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return random_experts(CLASSES["MixtralExperts"], dtype) if kind == "known" else unknown(kind, dtype)


def unknown(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    if kind == "an activation of PyTorch":
        return random_experts(CLASSES["MixtralExperts"], dtype, hidden_act="mish")
    if kind == "an ungated one":
        return random_experts(CLASSES["NemotronHExperts"], dtype, mlp_hidden_act="mish")
    if kind == "a known gate around another activation":
        return random_experts(CLASSES["DeepseekV4Experts"], dtype, hidden_act="gelu")
    base = CLASSES["GptOssExperts" if kind == "a gate with biases and transposed weights" else "MixtralExperts"]
    module = random_experts(base, dtype)
    module.act_fn = ACT2FN["silu"]
    module.__class__ = type("RemoteExperts", (base,), {"_apply_gate": swish_of_both, "__module__": "remote.code"})
    return module


UNKNOWN = (
    "an activation of PyTorch",
    "an ungated one",
    "a known gate around another activation",
    "a gate of remote code",
    "a gate with biases and transposed weights",
)


def reference(kind: str) -> str:
    """The library's own forwards spell their gates out; ``batched_mm`` calls ``_apply_gate``."""
    return "batched_mm" if "a gate" in kind else "eager"


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_gate_is_right_and_named_once(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    gates._cached_rule.cache_clear()
    module = unknown(kind)
    given = inputs(module)
    ours = outputs_and_gradients(module, "supersonic", *given)
    outputs_and_gradients(module, "supersonic", *given)
    wanted = outputs_and_gradients(module, reference(kind), *given)
    assert max(rel_fro(ours[leaf], wanted[leaf]) for leaf in wanted) < 1e-13
    warnings = [r.getMessage() for r in caplog.records if "is not known to supersonic-moe" in r.getMessage()]
    assert len(warnings) == 1 and type(module).__name__ in warnings[0]


@dataclass
class Scaled:
    """Can be called, and has no hash."""

    by: float = 0.5

    def __call__(self, x: Tensor) -> Tensor:
        return F.silu(x) * self.by


def test_an_activation_without_a_hash_is_right() -> None:
    module = experts_of("known")
    del module.act_fn
    module.act_fn = Scaled()
    given = inputs(module)
    ours, wanted = (outputs_and_gradients(module, name, *given) for name in ("supersonic", "eager"))
    assert max(rel_fro(ours[leaf], wanted[leaf]) for leaf in wanted) < 1e-13


def test_an_activation_that_is_replaced_for_all_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts_of("known")
    given = inputs(module)
    before = outputs_and_gradients(module, "supersonic", *given)
    monkeypatch.setattr(type(module.act_fn), "forward", lambda self, x: x.tanh())
    ours, wanted = (outputs_and_gradients(module, name, *given) for name in ("supersonic", "eager"))
    assert max(rel_fro(ours[leaf], wanted[leaf]) for leaf in wanted) < 1e-13
    assert rel_fro(before["out"], wanted["out"]) > 0.1


def test_a_gate_of_ones_own_keeps_no_module_alive() -> None:
    module = experts_of("known")
    del module.act_fn
    module.act_fn = MethodType(lambda self, x: F.mish(x), module)
    given = inputs(module)
    module.config._experts_implementation = "supersonic"
    module(*given)
    alive = weakref.ref(module)
    del module, given
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("kind", ["known", "an activation of PyTorch"])
def test_weights_of_other_shapes_than_the_ids_are_refused(kind: str) -> None:
    """Turned, they have as many numbers."""
    module = experts_of(kind)
    x, ids, scores = inputs(module)
    module.config._experts_implementation = "supersonic"
    with pytest.raises(ValueError, match="must have the shape of top"):
        module(x, ids, scores.T)
    with pytest.raises(ValueError, match=r"topk_ids must have 2 dimensions \(T, K\)"):
        module(x, ids[:, 0], scores[:, 0])


# ---- ids and dtypes --------------------------------------------------------------------------------------------------


def other_gate(self: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    return torch.sin(gate) * up


CHANGES: dict[str, tuple[str, Any]] = {
    "a gate of one module": ("GptOssExperts", lambda m: setattr(m, "_apply_gate", functools.partial(other_gate, m))),
    "no clamp": ("GptOssExperts", lambda m: setattr(m, "limit", float("inf"))),
    "a learned alpha": ("GptOssExperts", lambda m: setattr(m, "alpha", nn.Parameter(m.down_proj.new_tensor(1.3)))),
    "a hook on act_fn": ("MixtralExperts", lambda m: m.act_fn.register_forward_hook(lambda _, __, out: 3 * out)),
    "an act_fn with a forward of its own": ("MixtralExperts", lambda m: setattr(m.act_fn, "forward", torch.tanh)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_gate_that_was_changed_is_followed(kind: str) -> None:
    name, change = CHANGES[kind]
    module = random_experts(CLASSES[name])
    change(module)
    given = inputs(module)
    ours, eager = (outputs_and_gradients(module, name, *given) for name in ("supersonic", "eager"))
    assert max(rel_fro(ours[leaf], eager[leaf]) for leaf in eager) < 1e-13


def test_a_gate_that_is_changed_between_calls_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = random_experts(CLASSES["GptOssExperts"])
    given = inputs(module)
    outputs_and_gradients(module, "supersonic", *given)
    monkeypatch.setattr(CLASSES["GptOssExperts"], "_apply_gate", other_gate)
    ours, eager = (outputs_and_gradients(module, name, *given) for name in ("supersonic", "eager"))
    assert max(rel_fro(ours[leaf], eager[leaf]) for leaf in eager) < 1e-13


@pytest.mark.parametrize("kind", ["known", "a gate of remote code"])
def test_sentinels_of_expert_parallelism_are_skipped(kind: str) -> None:
    """Id E with weight 0, as the library's router masks experts of other ranks; NaN must not get through."""
    module = experts_of(kind)
    x, ids, scores = inputs(module)
    away = torch.zeros(TOKENS, CHOICES, dtype=torch.bool)
    away[::2, 1], away[5] = True, True
    scores = scores.detach().masked_fill(away, 0).requires_grad_()
    wanted = outputs_and_gradients(module, reference(kind), x, ids, scores)
    poisoned = scores.detach().masked_fill(away, torch.nan).requires_grad_()
    ours = outputs_and_gradients(module, "supersonic", x, ids.masked_fill(away, EXPERTS), poisoned)
    wanted["scores"] = wanted["scores"].masked_fill(away, 0)
    assert max(rel_fro(ours[leaf], wanted[leaf]) for leaf in wanted) < 1e-13


@pytest.mark.parametrize("kind", ["known", "a gate of remote code"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(kind: str, tokens: int) -> None:
    module = experts_of(kind)
    x, ids, scores = (t[:tokens] for t in inputs(module))
    ours, eager = (outputs_and_gradients(module, name, x, ids, scores) for name in ("supersonic", "batched_mm"))
    assert max(rel_fro(ours[leaf], eager[leaf]) for leaf in eager) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts", "NemotronHExperts"])
def test_16_bit_is_no_further_from_fp64_than_the_library(name: str, dtype: torch.dtype) -> None:
    module, exact = random_experts(CLASSES[name], dtype), random_experts(CLASSES[name])
    exact.load_state_dict(module.state_dict())
    given = inputs(module, dtype)
    x, ids, scores = given
    doubles = x.detach().double().requires_grad_(), ids, scores.detach().double().requires_grad_()
    wanted = outputs_and_gradients(exact, "eager", *doubles)
    errors = {}
    for implementation in ("supersonic", "eager"):
        got = outputs_and_gradients(module, implementation, *given)
        assert got["out"].dtype is dtype
        errors[implementation] = {leaf: rel_fro(got[leaf], wanted[leaf]) for leaf in wanted}
    assert {leaf for leaf, error in errors["supersonic"].items() if error > 1.1 * errors["eager"][leaf]} == set()


def test_fp32_hidden_states_into_bf16_weights_are_converted_as_the_library_does() -> None:
    module = random_experts(CLASSES["MixtralExperts"], torch.bfloat16)
    x, ids, scores = inputs(module, torch.float32)
    ours, theirs = (outputs_and_gradients(module, name, x, ids, scores) for name in ("supersonic", "grouped_mm"))
    assert ours["out"].dtype is torch.float32 and ours["x"].dtype is torch.float32
    assert all(rel_fro(ours[leaf], theirs[leaf]) < 1e-2 for leaf in theirs)


@pytest.mark.parametrize("kind", ["known", "a gate of remote code"])
def test_autocast(kind: str) -> None:
    module = experts_of(kind, torch.float32)
    given = inputs(module, torch.float32)
    wanted = outputs_and_gradients(module, reference(kind), *given)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_gradients(module, "supersonic", *given)
    assert all(t.dtype is torch.float32 for t in ours.values())
    assert all(1e-4 < rel_fro(ours[leaf], wanted[leaf]) < 1e-2 for leaf in wanted)


@pytest.mark.parametrize("kind", ["known", "a gate of remote code"])
def test_fp8_recipe(kind: str) -> None:
    """experts_implementation="supersonic_fp8": training in FP8 from BF16 weights."""
    module = experts_of(kind, torch.bfloat16)
    given = inputs(module, torch.bfloat16)
    wanted, ours = (outputs_and_gradients(module, name, *given) for name in ("supersonic", "supersonic_fp8"))
    errors = {leaf: rel_fro(ours[leaf], wanted[leaf]) for leaf in wanted}
    assert all(0.01 < error < 0.12 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_micro_batches_share_quantized_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [0]

    def counted(cache: WeightCache, weights: Any, options: Any, quantize: Any) -> Any:
        def count(indices: Any) -> Any:
            counts[0] += len(indices)
            return quantize(indices)

        return get(cache, weights, options, count)

    get = WeightCache.get
    monkeypatch.setattr(WeightCache, "get", counted)
    module = random_experts(CLASSES[name], torch.bfloat16)
    given = inputs(module, torch.bfloat16)
    wanted = outputs_and_gradients(module, "supersonic_fp8", *given)
    model, counts[0] = nn.ModuleList([module]), 0
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    with constant_weights(model):
        for _ in range(2):
            with constant_weights(model):
                ours = outputs_and_gradients(module, "supersonic_fp8", *given)
            assert counts[0] == 2 and all(torch.equal(ours[leaf], wanted[leaf]) for leaf in wanted)
        module.down_proj.grad = torch.ones_like(module.down_proj)
        optimizer.step()
        changed = outputs_and_gradients(module, "supersonic_fp8", *given)["out"]
        assert counts[0] == 4 and not torch.equal(changed, wanted["out"])
    assert not held_weights._CACHES and held_weights.cache_of(module) is None
    assert torch.equal(outputs_and_gradients(module, "supersonic_fp8", *given)["out"], changed)


def test_who_has_no_experts_to_hold_is_told() -> None:
    for model, error in ((nn.Linear(2, 2), ValueError), ("a name", TypeError)):
        with pytest.raises(error, match="constant_weights needs a"), constant_weights(model):  # type: ignore[arg-type]
            pass


# ---- around it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    module = random_experts(CLASSES["GptOssExperts"], torch.bfloat16)
    module.config._experts_implementation = "supersonic"
    found = []
    for call in (module, functools.partial(checkpoint, module, use_reentrant=reentrant)):
        x, ids, scores = inputs(module, torch.bfloat16)
        module.zero_grad()
        call(x, ids, scores).float().square().sum().backward()
        found.append([x.grad, scores.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


COMPILED = ("MixtralExperts", "GptOssExperts", "DeepseekV4Experts", "Gemma4TextExperts", "NemotronHExperts", "mish")


@pytest.mark.parametrize(("name", "dynamic"), [*((name, True) for name in COMPILED), ("GptOssExperts", None)])
def test_compiles_in_one_graph_for_every_number_of_tokens(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    module = unknown("an activation of PyTorch") if name == "mish" else random_experts(CLASSES[name])
    for constant in ("limit", "alpha"):  # those of the library's models
        if hasattr(module, constant):
            setattr(module, constant, {"limit": 7.0, "alpha": 1.702}[constant])
    module.config._experts_implementation = "supersonic"
    graphs = Graphs()
    layers = nn.ModuleList([module, copy.deepcopy(module)])  # the layers of a model share their code
    found = []
    for layer in layers:
        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=graphs)
        for tokens in (13, 7, 10):
            x, ids, scores = (t[:tokens] for t in inputs(module))
            got, want = compiled(x, ids, scores), layer(x, ids, scores)
            leaves = [x, scores, *layer.parameters()]
            grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (got, want)]
            found.append(torch.equal(got, want) and all(map(torch.equal, *grads)))
    assert all(found)
    assert len(graphs) <= (1 if dynamic else 2) * len(layers)


@pytest.mark.parametrize("counts", [(1, 13, 7), (13, 1, 7)], ids=str)
def test_one_token_has_a_graph_of_its_own_when_compiled(counts: tuple[int, ...]) -> None:
    """torch takes a size of 1 for a constant, even with ``dynamic=True``."""
    torch._dynamo.reset()
    module, graphs = random_experts(CLASSES["MixtralExperts"]), Graphs()
    module.config._experts_implementation = "supersonic"
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    for count in (*counts, *counts):
        given = [t[:count].detach().clone() for t in inputs(module)]
        assert torch.equal(compiled(*given), module(*given))
    assert len(graphs) == 2


def test_constants_that_are_not_common_compile_too() -> None:
    torch._dynamo.reset()
    module = random_experts(CLASSES["GptOssExperts"])
    module.limit, module.alpha = 0.77, 1.31
    given = inputs(module)
    want = outputs_and_gradients(module, "supersonic", *given)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    assert rel_fro(compiled(*given).detach(), want["out"]) < 1e-14


def test_export_with_any_number_of_tokens() -> None:
    module = random_experts(CLASSES["Qwen3MoeExperts"])
    module.config._experts_implementation = "supersonic"
    given = tuple(t.detach() for t in inputs(module))
    tokens = torch.export.Dim("tokens", min=2, max=65536)
    program = torch.export.export(module, given, dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}))
    shorter = tuple(t[:5] for t in given)
    assert torch.equal(program.module()(*shorter), module(*shorter))


def test_a_class_of_a_users_own_is_served() -> None:
    """Decorated outside the library: the contract is enough."""

    @use_experts_implementation
    class MyExperts(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
            self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 8, HIDDEN))
            self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 4))

        def forward(self, *_: Tensor) -> Tensor:
            raise AssertionError("its own forward")

    module = MyExperts(SimpleNamespace(_experts_implementation="supersonic")).double()
    x, ids, scores = inputs(module)
    want = sm.topk_experts(x, ids, scores, module.gate_up_proj, module.down_proj, layout="gate_up")
    assert torch.equal(module(x, ids, scores), want)
    assert backend.recipe_of("supersonic") == sm.Bf16Recipe() and backend.recipe_of("supersonic_fp8") == sm.Fp8Recipe()
    assert backend.recipe_of("eager") is None and backend.recipe_of("grouped_mm") is None
