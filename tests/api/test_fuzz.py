"""The public functions on whatever callers pass: views of buffers at any element, frozen operands, hooks, ids and
scores of any dtype, every way to a routing plan, recipes, both kinds of checkpoint; against a loop over tokens in fp64.

FP8 is another function of its operands, which ``tests/training/test_fp8_layer.py`` judges. Here it must give the bits
of the same call on plain operands, without hooks and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from views import PLAIN, Place, in_one_buffer, lay

import supersonic_moe as sm
from supersonic_moe import Activation, ActivationType, GateUpLayout

SMOOTH = [ActivationType.SWIGLU, ActivationType.GEGLU, ActivationType.SILU, ActivationType.GELU]
"""In 16 bits an element near a kink may fall on its other side."""
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-14}
HOOKS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "cloned": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "on the host": save_on_cpu,
    "in one buffer": in_one_buffer,
}
ROUTERS = [
    sm.SoftmaxAfterTopK(),
    sm.SoftmaxBeforeTopK(renormalize=False),
    sm.SoftmaxBeforeTopK(renormalize=True),
    sm.SigmoidGroupedTopK(scaling_factor=2.5),
]


@dataclass(frozen=True)
class Case:
    entry: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    k: int
    seed: int
    dtype: torch.dtype
    activation: Activation
    layout: GateUpLayout
    recipe: sm.Fp8Recipe | None
    router: Any
    router_dtype: torch.dtype | None
    padding: bool
    """Some tokens of a layer are padding, NaN at that."""
    tile: int
    ids_dtype: torch.dtype
    scores_dtype: torch.dtype
    biases: tuple[bool, bool]
    frozen: frozenset[str]
    places: dict[str, Place] = field(default_factory=dict)
    hooks: str = "none"
    grad_hooks: bool = False
    checkpoint: str = "none"
    sum_loss: bool = False
    """The gradient of the output is a single number, expanded."""
    backend: str = "auto"

    def plain(self) -> Case:
        return replace(self, places={}, hooks="none", grad_hooks=False, checkpoint="none")


@st.composite
def cases(draw: Any, tokens: int, sizes: list[int], backends: list[str], dtypes: list[torch.dtype]) -> Case:
    def one(options: Any) -> Any:
        return draw(st.sampled_from(list(options)))

    dtype, experts = one(dtypes), draw(st.integers(1, 5))
    recipe = one([None, sm.Fp8Recipe(), sm.Fp8Recipe(wgrad="bf16", save_preactivation="bf16", scale="pow2")])
    recipe = recipe if dtype is torch.bfloat16 and one((True, False)) else None
    exact = dtype in (torch.float32, torch.float64)
    activation = Activation(one(ActivationType if exact else SMOOTH))
    if activation.type is ActivationType.SWIGLU and exact and one((True, False)):
        activation = Activation.gpt_oss(limit=0.9)
    place = st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 4, 8]), st.booleans())
    places = {name: draw(place) for name in ("x", "scores", "w1", "b1", "w2", "b2", "router", "ids", "dout", "bias")}
    rows = ("b1", "b2", "router")  # whose last dimension has to be contiguous
    return Case(
        entry=one(ENTRIES),
        tokens=draw(st.integers(0, tokens)),
        hidden=one(sizes),
        intermediate=one(sizes),
        experts=experts,
        k=draw(st.integers(1, min(3, experts))),
        seed=draw(st.integers(0, 2**20)),
        dtype=dtype,
        activation=activation,
        layout=one(GateUpLayout if activation.gated else [GateUpLayout.INTERLEAVED]),
        recipe=recipe,
        router=one(ROUTERS),
        router_dtype=one((None, torch.promote_types(dtype, torch.float32))),
        padding=one((True, False)),
        tile=one((1, 4)),
        ids_dtype=one((torch.int32, torch.int64)),
        scores_dtype=one((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        biases=(one((True, False)), one((True, False))),
        frozen=frozenset(draw(st.sets(st.sampled_from(["x", "scores", "w1", "b1", "w2", "b2", "router"]), max_size=4))),
        places={name: (front, behind, turned and name not in rows) for name, (front, behind, turned) in places.items()},
        hooks=one(HOOKS),
        grad_hooks=one((True, False)),
        checkpoint=one(("none", "reentrant", "not reentrant")),
        sum_loss=one((True, False)),
        backend=one(backends),
    )


# ---- operands --------------------------------------------------------------------------------------------------------


@dataclass
class Operands:
    """Slots in the order of their scores, and leaves by name."""

    tokens_S: Tensor
    experts_S: Tensor
    leaves: dict[str, Tensor]
    dout: Tensor
    mask_T: Tensor | None = None
    """False where a token is padding."""


def operands(case: Case, device: str) -> Operands:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    tokens, experts, k = case.tokens, case.experts, case.k
    fan = case.activation.fan
    ids_TK = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k]
    masked = torch.rand(tokens, k, generator=generator) < 0.2
    tokens_S, experts_S = torch.arange(tokens).repeat_interleave(k), ids_TK.masked_fill(masked, -1).flatten()
    if case.entry == "triples":  # in any order, any number for a token
        kept = torch.randperm(tokens * k, generator=generator)[: tokens * k - tokens * k // 3]
        tokens_S, experts_S = tokens_S[kept], experts_S[kept]
    if case.entry == "offsets":  # sorted rows, some of nobody at the end
        tokens_S = torch.arange(tokens)
        experts_S = torch.randint(experts + 1, (tokens,), generator=generator).sort().values
    leaves = {
        "x": normal(tokens, case.hidden),
        "w1": normal(experts, fan * case.intermediate, case.hidden) * case.hidden**-0.5,
        "w2": normal(experts, case.hidden, case.intermediate) * case.intermediate**-0.5,
    }
    if case.biases[0]:
        leaves["b1"] = normal(experts, fan * case.intermediate)
    if case.biases[1]:
        leaves["b2"] = normal(experts, case.hidden)
    if case.entry == "layer":
        leaves["router"] = normal(experts, case.hidden) * case.hidden**-0.5
    else:
        scores = torch.rand(tokens_S.shape, generator=generator).to(case.scores_dtype)
        leaves["scores"] = scores.view(tokens, k) if case.entry in ("topk", "deepep") else scores
    dout = (
        torch.ones((), dtype=case.dtype).expand(tokens, case.hidden) if case.sum_loss else normal(tokens, case.hidden)
    )
    moved = {name: t.to(device) for name, t in leaves.items()}
    mask_T = torch.arange(tokens, device=device) % 3 != 1 if case.entry == "layer" and case.padding else None
    return Operands(tokens_S.to(device), experts_S.to(device), moved, dout.to(device), mask_T)


# ---- ways into the layer ---------------------------------------------------------------------------------------------

Call = Callable[[dict[str, Tensor], dict[str, Any]], Tensor]


def entry_point(case: Case, made: Operands) -> Call:
    """A function of leaves and options that gives the output, and, of the layer, the logits behind it."""

    def at(t: Tensor, name: str = "ids") -> Tensor:
        return lay(t.to(case.ids_dtype), case.places.get(name, PLAIN))

    tokens, experts, k = case.tokens, case.experts, case.k
    ids_TK = made.experts_S.view(tokens, k) if case.entry in ("topk", "deepep", "plan") else torch.empty(0)

    def layer(leaf: dict[str, Tensor], options: dict[str, Any]) -> Any:
        sigmoid = isinstance(case.router, sm.SigmoidGroupedTopK)
        bias = lay(correction_bias(case, made.dout.device), case.places.get("bias", PLAIN)) if sigmoid else None
        return sm.moe_layer(
            leaf["x"], leaf["router"], leaf["w1"], leaf["w2"], k, router=case.router, correction_bias=bias,
            router_dtype=case.router_dtype, token_mask_T=made.mask_T, **options,
        )[:2]  # fmt: skip

    def topk(leaf: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        return sm.topk_experts(leaf["x"], at(ids_TK), leaf["scores"], leaf["w1"], leaf["w2"], **options)

    def triples(leaf: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        slots = at(made.tokens_S), at(made.experts_S), leaf["scores"]
        return sm.routed_experts(leaf["x"], *slots, leaf["w1"], leaf["w2"], **options)

    def offsets(leaf: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        ends = torch.bincount(made.experts_S, minlength=experts + 1)[:experts].cumsum(0)
        return sm.dispatched_experts(leaf["x"], at(ends), leaf["w1"], leaf["w2"], scores_R=leaf["scores"], **options)

    def deepep(leaf: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        counts = torch.bincount(made.experts_S[made.experts_S >= 0], minlength=experts)
        given = counts if case.seed % 2 else counts.tolist()
        plan, scores_S = sm.plan_from_deepep(at(ids_TK), leaf["scores"], given, tile=case.tile)
        return sm.experts_from_plan(leaf["x"], scores_S, plan, leaf["w1"], leaf["w2"], **options)

    def plan(leaf: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        made_plan = sm.plan_from_topk(at(ids_TK), experts, tile=case.tile)
        return sm.experts_from_plan(leaf["x"], leaf["scores"], made_plan, leaf["w1"], leaf["w2"], **options)

    return {"layer": layer, "topk": topk, "triples": triples, "offsets": offsets, "deepep": deepep, "plan": plan}[
        case.entry
    ]


ENTRIES = ("layer", "topk", "triples", "offsets", "deepep", "plan")


def correction_bias(case: Case, device: Any) -> Tensor:
    return torch.linspace(-0.2, 0.2, case.experts, device=device)


def run(case: Case, device: str) -> tuple[dict[str, Tensor], Tensor | None]:
    """(output and gradients by name, logits of the layer)."""
    made = operands(case, device)
    if made.mask_T is not None:
        made.leaves["x"] = torch.where(made.mask_T[:, None], made.leaves["x"], torch.nan)
    laid = {name: lay(t, case.places.get(name, PLAIN)) for name, t in made.leaves.items()}
    leaves = {name: t.requires_grad_(name not in case.frozen) for name, t in laid.items()}
    call, names = entry_point(case, made), tuple(leaves)

    def forward(*tensors: Tensor) -> Any:
        leaf = dict(zip(names, tensors, strict=True))
        options = dict(activation=case.activation, layout=case.layout, recipe=case.recipe, backend=case.backend)
        return call(leaf, options | {name: leaf[name] for name in ("b1", "b2") if name in leaf})

    wanted = any(t.requires_grad for t in leaves.values())
    if case.grad_hooks:
        for t in leaves.values():
            if t.requires_grad:
                t.register_hook(torch.clone)
    with HOOKS[case.hooks]():
        if case.checkpoint != "none" and wanted:
            result = checkpoint(forward, *leaves.values(), use_reentrant=case.checkpoint == "reentrant")
        else:
            result = forward(*leaves.values())
    out, logits = result if case.entry == "layer" else (result, None)
    assert out.requires_grad == wanted and out.dtype is case.dtype and out.shape == made.leaves["x"].shape
    if wanted:
        dout = made.dout if case.sum_loss else lay(made.dout, (*case.places.get("dout", PLAIN)[:2], False))
        out.backward(dout)
    grads = {f"d{name}": t.grad for name, t in leaves.items() if t.grad is not None}
    assert set(grads) == {f"d{name}" for name, t in leaves.items() if t.requires_grad}
    assert all(grads[f"d{name}"].dtype is t.dtype for name, t in leaves.items() if t.requires_grad)
    return {"out": out.detach(), **grads}, None if logits is None else logits.detach()


# ---- the definition --------------------------------------------------------------------------------------------------


def expected(case: Case, logits: Tensor | None, spread: float = 0.0) -> dict[str, Tensor]:
    """Output and gradients in fp64 on the host, of operands that are off by ``spread`` of each element."""
    made = operands(case, "cpu")
    off = {name: t.double() * (1 + spread * torch.randn(t.shape)) for name, t in made.leaves.items()}
    leaves = {name: t.requires_grad_(name not in case.frozen) for name, t in off.items()}
    if logits is None:
        slots = zip(made.tokens_S.tolist(), made.experts_S.tolist(), leaves["scores"].reshape(-1), strict=True)
        triples = [(t, e, s) for t, e, s in slots if 0 <= e < case.experts]
    else:
        linear = leaves["x"] @ leaves["router"].T
        values = linear + (logits.cpu().double() - linear).detach()  # those that were routed
        tokens = range(case.tokens) if made.mask_T is None else made.mask_T.nonzero().flatten().tolist()
        triples = [(t, e, s) for t in tokens for e, s in routed(case, values[t])]
    experts = leaves["w1"], leaves.get("b1"), leaves["w2"], leaves.get("b2")
    out = oracle.experts(leaves["x"], triples, *experts, case.activation, case.layout)
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads: Any = [torch.zeros_like(t) for t in wanted.values()]
    if out.requires_grad:
        dout = made.dout.double()
        grads = torch.autograd.grad(out, [*wanted.values()], dout, allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}


def routed(case: Case, logits_E: Tensor) -> list[tuple[int, Tensor]]:
    """(expert, score) of the K choices of a token."""
    rule, k = case.router, case.k
    if isinstance(rule, sm.SigmoidGroupedTopK):
        affinity = logits_E.sigmoid()
        chosen = (affinity + correction_bias(case, "cpu")).argsort(descending=True, stable=True)[:k]
        scores = affinity[chosen]
        scores = 2.5 * (scores / scores.sum() if k > 1 else scores)
    else:
        chosen = logits_E.argsort(descending=True, stable=True)[:k]
        whole = isinstance(rule, sm.SoftmaxBeforeTopK) and not rule.renormalize
        scores = logits_E.softmax(0)[chosen] if whole else logits_E[chosen].softmax(0)
    return list(zip(chosen.tolist(), scores, strict=True))


def check(case: Case, device: str) -> None:
    got, logits = run(case, device)
    if case.recipe is not None:
        want, _ = run(case.plain(), device)
        assert all(torch.equal(got[name], t) for name, t in want.items())
        return
    for name, exact in expected(case, logits).items():
        bound = max(BOUNDS[case.dtype], torch.finfo(got[name].dtype).eps)
        error, size = float((got[name].cpu().double() - exact).norm()), float(exact.norm())
        if error > bound * size:  # terms that cancel: what counts is how far rounded operands move the result
            moved = [(expected(case, logits, 1e-6)[name] - exact).norm() for _ in range(8)]
            size = float(torch.stack(moved).square().mean().sqrt()) / 1e-6
        assert error <= bound * size, f"{name} is off by {error}; it is {float(exact.norm())}, its terms {size}"


@given(cases(6, [8, 24], ["auto"], [torch.bfloat16, torch.float16, torch.float32, torch.float64]))
@settings(max_examples=400)
@pytest.mark.filterwarnings("ignore:.*only expert is 1")
def test_whatever_callers_pass(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.gpu
@given(cases(40, [64, 200], ["sm90", "triton", "auto"], [torch.bfloat16, torch.float16, torch.float32]))
@settings(max_examples=200)
@pytest.mark.filterwarnings("ignore:.*only expert is 1")
def test_whatever_callers_pass_on_a_gpu(case: Case) -> None:
    backend = "auto" if case.dtype is not torch.bfloat16 or (case.recipe and case.backend == "triton") else case.backend
    check(replace(case, backend=backend), "cuda")
