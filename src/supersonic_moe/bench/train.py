"""Training in FP8 beside training in BF16: the demo's model from the same weights on the same batches, judged on
held-out files as training goes on.

Model, optimizer and learning rate are those of the demo (``demo/train.py``: bf16 weights, fp32 master copies); only the
recipe of the MoE layers differs. Each run is evaluated in the recipe that it trains in, at about ``EVALUATIONS`` points
and at its end. What counts is the last: ``gap``, by how much the FP8 run's held-out bits per byte exceed the BF16
run's. Beside it stand ``gap_in_bf16``, the same with the FP8-trained weights judged in BF16, which leaves out what FP8
costs in the evaluation, and as a yardstick ``gap_other_batches``, by how much another BF16 run from the same weights
exceeds the first if it draws other batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console

from supersonic_moe import constant_weights, fp8_training
from supersonic_moe.bench.layer import OURS_BF16, recipe_name
from supersonic_moe.bench.report import OURS, CaseResult, Metrics
from supersonic_moe.demo.data import Corpus
from supersonic_moe.demo.model import ByteTransformer
from supersonic_moe.demo.report import smoothed
from supersonic_moe.demo.train import TrainConfig, default_config, evaluate, train_model, whole_windows
from supersonic_moe.recipe import Fp8Recipe, Recipe

EVALUATIONS = 10
LAST = 50  # steps whose training loss is averaged
GOAL = 0.005  # the gap that FP8 may have


@dataclass
class Run:
    """One training run. Bits per byte."""

    recipe: Recipe
    train_bpb: list[float] = field(default_factory=list)  # of every step
    held_out_bpb: dict[int, float] = field(default_factory=dict)  # by steps done
    held_out_in_bf16: float = math.nan  # at the end

    def metrics(self, steps_done: int) -> Metrics:
        last = self.train_bpb[max(0, steps_done - LAST) : steps_done]
        return {"held_out_bpb": self.held_out_bpb[steps_done], "train_bpb": sum(last) / len(last)}


def config_for(device: torch.device) -> TrainConfig:
    """The demo's configuration of this device, in bf16: FP8 layers take nothing else."""
    return replace(default_config(device), dtype=torch.bfloat16)


def train(
    recipe: Recipe,
    config: TrainConfig,
    corpus: Corpus,
    steps: int,
    seed: int,
    device: torch.device,
    console: Console,
    *,
    batch_seed: int | None = None,
) -> Run:
    """Train one model, from the weights and on the batches of ``seed``, or on those of ``batch_seed``."""
    torch.manual_seed(seed)
    model = ByteTransformer(config.model).to(device, config.dtype)
    judged = whole_windows(corpus.held_out, config.model.context)
    run, every = Run(recipe), max(1, steps // EVALUATIONS)

    def judge(steps_done: int) -> None:
        if steps_done % every == 0 or steps_done == steps:
            with constant_weights(model):
                run.held_out_bpb[steps_done] = evaluate(model, judged)
            model.train()

    with fp8_training(model, recipe) if isinstance(recipe, Fp8Recipe) else nullcontext():
        batches = seed if batch_seed is None else batch_seed
        run.train_bpb = train_model(model, config, corpus, steps, batches, console, after_step=judge).train_bpb
    run.held_out_in_bf16 = evaluate(model, judged) if isinstance(recipe, Fp8Recipe) else run.held_out_bpb[steps]
    return run


def gap(run: Run, bf16: Run) -> float:
    """By how much a run ends above the BF16 run; negative where it ends below."""
    end = max(bf16.held_out_bpb)
    return run.held_out_bpb[end] / bf16.held_out_bpb[end] - 1


def cases(fp8: Run, bf16: Run, other_batches: Run, config: TrainConfig) -> list[CaseResult]:
    """A case for each point at which both runs were judged; the last is the result and has the gap."""
    m = config.model
    tokens, end = config.batch * m.context, max(bf16.held_out_bpb)
    sizes = f"T{tokens}_H{m.hidden}_I{m.intermediate}_E{m.experts}_K{m.experts_per_token}"
    name = f"demo_{m.layers}layers_{sizes}_{recipe_name(fp8.recipe)}"
    found = []
    for steps_done in bf16.held_out_bpb:
        both = {OURS: fp8.metrics(steps_done), OURS_BF16: bf16.metrics(steps_done)}
        found.append(CaseResult(f"{name}/{steps_done}steps", both))
    found[-1].metrics[OURS] |= {
        "gap": gap(fp8, bf16),
        "gap_in_bf16": fp8.held_out_in_bf16 / bf16.held_out_bpb[end] - 1,
        "gap_other_batches": gap(other_batches, bf16),
        "steps": end,
    }
    return found


def write_curve(path: Path, fp8: Run, bf16: Run, title: str) -> None:
    """Left the two curves, which should look like one; right how far apart they are, beside the goal."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for run, color in ((bf16, "#c8553d"), (fp8, "#0b6e4f")):
        name = recipe_name(run.recipe)
        left.plot(smoothed(run.train_bpb), color=color, linewidth=1, label=f"{name}, training batches")
        end = max(run.held_out_bpb)
        label = f"{name}, held-out files: {run.held_out_bpb[end]:.4f} at the end"
        left.plot(*_points(run.held_out_bpb), "o", color=color, markersize=4, label=label)
    excess = {step: 100 * (fp8.held_out_bpb[step] / bits - 1) for step, bits in bf16.held_out_bpb.items()}
    right.plot(*_points(excess), "o-", color="#0b6e4f", label="held-out files")
    right.axhspan(-100 * GOAL, 100 * GOAL, color="#8d99ae", alpha=0.2, label=f"± {100 * GOAL:g} %")
    top = 1.2 * max(100 * GOAL, *map(abs, excess.values()))
    left.set(xlabel="step", ylabel="bits per byte", yscale="log")
    left.yaxis.set(major_formatter=ScalarFormatter(), minor_formatter=ScalarFormatter())  # 0.8, not 8 x 10^-1
    right.set(xlabel="step", ylabel="FP8 above BF16, %", ylim=(-top, top))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _points(values: dict[int, float]) -> tuple[Sequence[int], Sequence[float]]:
    return list(values), list(values.values())
