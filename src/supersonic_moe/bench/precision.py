"""The precision suite: what every choice of the FP8 recipe costs in accuracy, and what it is worth in time and memory.

The recipes are all combinations of weight gradients (fp8, bf16), saved pre-activation (fp8, int8, bf16, recompute) and
scales (fp32, powers of two), and one that quantizes the weights again in backward, beside our BF16 layer. Each runs the
experts alone, on routing and scores that are given, so that the gradient of the scores can be looked at; time and
memory are those of one forward + backward on Gaussian inputs.

Errors are those of the output and of every gradient, against the reference in fp32 on the same bf16 numbers:

    cos      cosine of the angle between the two, as vectors
    rrmse    ||ours - exact|| / ||exact||

Inputs (``INPUTS``): what a quantizer likes, and three things that it does not. Routing comes from a random router on x,
so scores are those of a softmax and tokens of one expert differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from supersonic_moe import KernelBackendMoE, topk_experts
from supersonic_moe.bench.layer import OURS_BF16, LayerConfig, recipe_name, saved_bytes
from supersonic_moe.bench.report import MIB, OURS, CaseResult, Metrics, part_of_a_run, short, write_text
from supersonic_moe.bench.timing import Missing, NoResultError, attempt, clock_for, measure, required
from supersonic_moe.config.activation import as_activation
from supersonic_moe.config.recipe import Bf16Recipe, Fp8Recipe, Recipe
from supersonic_moe.perf_model import LayerShape
from supersonic_moe.routing.topk import route

TENSORS = ("out", "dx", "ds", "dw1", "dw2")

RECIPES: tuple[Recipe, ...] = (
    Bf16Recipe(),
    *(
        Fp8Recipe(wgrad=wgrad, save_preactivation=saved, scale=scale)  # type: ignore[arg-type]
        for wgrad, saved, scale in itertools.product(
            ("bf16", "fp8"), ("fp8", "int8", "bf16", "recompute"), ("fp32", "pow2")
        )
    ),
    Fp8Recipe(keep_transposed=False),
)


class Operands(NamedTuple):
    x_TH: Tensor
    w1_ENH: Tensor
    w2_EHI: Tensor
    dout_TH: Tensor


def gaussian(operands: Operands) -> None:
    """As drawn."""


def outliers(operands: Operands) -> None:
    """One channel in a hundred thirty times as large, as in language models."""
    for t in (operands.x_TH, operands.dout_TH):
        t[:, torch.randperm(t.shape[1], device=t.device)[: t.shape[1] // 100 + 1]] *= 30


def positive(operands: Operands) -> None:
    """Sums of one sign, where an accumulator of few bits loses most."""
    for t in (operands.x_TH, operands.w1_ENH, operands.w2_EHI):
        t.abs_()


def uneven(operands: Operands) -> None:
    """Gradients that differ by e^4 and more from token to token: hard on scales that many tokens share."""
    operands.dout_TH.mul_(torch.exp(2 * torch.randn_like(operands.dout_TH[:, :1])))


INPUTS: Mapping[str, Callable[[Operands], None]] = {f.__name__: f for f in (gaussian, outliers, positive, uneven)}


@dataclass
class PrecisionResult(CaseResult):
    """``metrics``: time and memory by recipe; ``errors``: by recipe, inputs and tensor."""

    errors: dict[str, dict[tuple[str, str], Metrics]] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        return list(self.missing)

    def cases(self) -> list[CaseResult]:
        """A case of the file for each FP8 recipe, and for each of its errors; our BF16 layer is the peer of all."""
        baseline, found = recipe_name(Bf16Recipe()), []
        for name in self.metrics:
            if name != baseline:
                step = {OURS: self.metrics[name], OURS_BF16: self.metrics[baseline]}
                found.append(CaseResult(f"{self.case}_{name}", step))
                for (inputs, tensor), error in self.errors[name].items():
                    both = {OURS: error, OURS_BF16: self.errors[baseline][inputs, tensor]}
                    found.append(CaseResult(f"{self.case}_{name}/{inputs}/{tensor}", both))
        return found


class Layer:
    """Experts with given routing: operands of one kind, and what runs on them."""

    def __init__(self, shape: LayerShape, config: LayerConfig, kind: str) -> None:
        T, H, I, E = shape.tokens, shape.hidden, shape.intermediate, shape.experts  # noqa: E741
        normal = partial(torch.randn, device=config.device, dtype=torch.bfloat16)
        self.activation, self.backend = as_activation(config.activation), KernelBackendMoE[config.backend].value
        w1_ENH, w2_EHI = normal(E, self.activation.fan * I, H).mul_(H**-0.5), normal(E, H, I).mul_(I**-0.5)
        self.operands = Operands(normal(T, H), w1_ENH, w2_EHI, normal(T, H))
        INPUTS[kind](self.operands)
        logits_TE = torch.nn.functional.normalize(self.operands.x_TH.float()) @ torch.randn(H, E, device=config.device)
        scores_TK, self.ids_TK = route(logits_TE, shape.top_k, config.router)
        self.leaves = [t.detach().requires_grad_() for t in (*self.operands[:1], scores_TK, *self.operands[1:3])]

    def forward(self, recipe: Recipe) -> Tensor:
        return self._forward(self.leaves, recipe, self.backend)

    def fwd_bwd(self, recipe: Recipe) -> tuple[Tensor, ...]:
        """As in ``TENSORS``."""
        out_TH = self.forward(recipe)
        return out_TH.detach(), *torch.autograd.grad(out_TH, self.leaves, self.operands.dout_TH)

    def exact(self) -> tuple[Tensor, ...]:
        """The same in fp32."""
        leaves = [t.detach().float().requires_grad_() for t in self.leaves]
        out_TH = self._forward(leaves, Bf16Recipe(), "reference")  # in the dtype of its inputs
        return out_TH.detach(), *torch.autograd.grad(out_TH, leaves, self.operands.dout_TH.float())

    def _forward(self, leaves: Sequence[Tensor], recipe: Recipe, backend: str) -> Tensor:
        x_TH, scores_TK, w1_ENH, w2_EHI = leaves
        operands = (x_TH, self.ids_TK, scores_TK, w1_ENH, w2_EHI)
        return topk_experts(*operands, activation=self.activation, recipe=recipe, backend=backend)


def error(ours: Tensor, exact: Tensor) -> Metrics:
    ours, exact = ours.double().flatten(), exact.double().flatten()
    size = exact.norm()
    return {"cos": float(ours @ exact / (ours.norm() * size)), "rrmse": float((ours - exact).norm() / size)}


def run_case(
    shape: LayerShape, config: LayerConfig, progress: Callable[[str], None] = lambda _: None
) -> PrecisionResult:
    """Errors of every recipe on all inputs, then time and memory of those that run."""
    result, running = PrecisionResult(str(shape)), {recipe_name(recipe): recipe for recipe in RECIPES}
    for kind in INPUTS:
        progress(f"{kind} inputs, in fp32")
        layer = required(result.case, partial(Layer, shape, config, kind))
        exact = required(result.case, layer.exact)
        for name, recipe in list(running.items()):
            progress(f"{kind} inputs, {name}")
            tensors = attempt(partial(layer.fwd_bwd, recipe))
            if isinstance(tensors, Missing):
                result.missing[name] = tensors.reason
                del running[name]
                continue
            of_recipe = result.errors.setdefault(name, {})
            for tensor, ours, wanted in zip(TENSORS, tensors, exact, strict=True):
                of_recipe[kind, tensor] = error(ours, wanted)
        del exact
    if recipe_name(Bf16Recipe()) not in running:
        raise NoResultError(f"{result.case}: our BF16 layer does not run: {result.missing[recipe_name(Bf16Recipe())]}.")

    progress(f"timing {len(running)} recipes")
    layer = required(result.case, partial(Layer, shape, config, "gaussian"))
    calls = {name: partial(layer.fwd_bwd, recipe) for name, recipe in running.items()}
    timed = partial(measure, calls, clock_for(config.device), warm_ms=config.warm_ms, min_ms=config.min_ms)
    for name, timing in required(f"{result.case}, timing", timed).items():
        if isinstance(timing, Missing):
            raise NoResultError(f"{result.case}, {name}: {timing.reason}.")
        activations, copies = saved_bytes(partial(layer.forward, running[name]), layer.leaves[2:])
        result.metrics[name] = {"fwd_bwd_us": timing.us, "fwd_bwd_spread": timing.spread, "saved_bytes": activations}
        if copies:
            result.metrics[name]["weight_copy_bytes"] = copies
    return result


# ---- the table -------------------------------------------------------------------------------------------------------


def ablation(result: PrecisionResult) -> list[list[str]]:
    """Headings, then a line for each recipe: choices, time, memory, rrmse of ``TENSORS`` in % by inputs."""
    baseline = result.metrics[recipe_name(Bf16Recipe())]["fwd_bwd_us"]
    lines = [["wgrad", "z", "scales", "µs", "vs BF16", "saved MiB", "FP8 weights MiB", *INPUTS, "lowest cos"]]
    for recipe in RECIPES:
        name = recipe_name(recipe)
        if name not in result.metrics:
            continue
        metrics, of_recipe = result.metrics[name], result.errors[name]
        choices = ["BF16 layer", "", ""]
        if isinstance(recipe, Fp8Recipe):
            again = "" if recipe.keep_transposed else ", weights again"
            choices = [recipe.wgrad, recipe.save_preactivation, recipe.scale + again]
        lines.append(
            [
                *choices,
                short(metrics["fwd_bwd_us"]),
                f"{baseline / metrics['fwd_bwd_us']:.2f}×",
                short(metrics["saved_bytes"] / MIB),
                short(metrics.get("weight_copy_bytes", 0) / MIB),
                *(" ".join(f"{100 * of_recipe[kind, tensor]['rrmse']:.2f}" for tensor in TENSORS) for kind in INPUTS),
                f"{min(e['cos'] for e in of_recipe.values()):.5f}",
            ]
        )
    return lines


def ablation_table(result: PrecisionResult) -> Table:
    headings, *lines = ablation(result)
    title = f"{result.case}   by inputs: relative RMS error in % of {', '.join(TENSORS)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < 3 else "right")
    for line in lines:
        table.add_row(*line)
    return table


FEW_TOKENS = """\
## What to expect of a few tokens

The errors here are those of whole tensors. The gradient of a score (ds) is a sum over I of products of either sign,
whose operands were rounded to e4m3; its error is a share of what such sums are on average, so it is large where its
own terms cancel. Over many tokens that evens out, of one token (T = 1) it shows: half of all tokens are as exact as the
whole, but some are off by several times as much, most with one choice ([facts.md](facts.md#fp8-accuracy)). Sums kept
unrounded would not help: it is the operands that are rounded."""


def write_markdown(path: Path, results: Sequence[PrecisionResult], document: Mapping[str, object]) -> None:
    """The tables as a page, with where their numbers come from."""
    origin = f"{document['device']}, torch {document['torch']}, commit `{str(document['commit'])[:12]}`"
    parts = [
        "# What every choice of the FP8 recipe costs, and what it is worth",
        f"Written by `{document['command']}` on {origin}, {str(document['date'])[:10]}. One forward + backward of the "
        "experts; by kind of inputs, relative RMS errors in per cent of "
        f"{', '.join(TENSORS)} against the reference in fp32. What the columns are: "
        "[bench/precision.py](../src/supersonic_moe/bench/precision.py).",
        FEW_TOKENS,
    ]
    if reason := part_of_a_run(document):
        parts.insert(1, f"**This page {reason}**")
    for result in results:
        headings, *lines = ablation(result)
        rule = ["---", "---", "---", *["---:"] * (len(headings) - 3)]
        rows = [f"| {' | '.join(cells)} |" for cells in (headings, rule, *lines)]
        parts += [f"## `{result.case}`", "\n".join(rows)]
        parts += [f"Not measured: {name}, {reason}." for name, reason in result.missing.items()]
    write_text(path, "\n\n".join(parts) + "\n")
