"""Training in FP8 beside training in BF16: the demo's model from the same weights on the same batches, judged on
held-out files as training goes on.

Model, optimizer and learning rate are those of the demo (``demo/train.py``: bf16 weights, fp32 master copies); only the
recipe of the MoE layers differs. Each run is evaluated in the recipe that it trains in, at about ``EVALUATIONS`` points
and at its end. What counts is the last: ``gap``, by how much the FP8 run's held-out bits per byte exceed the BF16
run's, the mean over the seeds. Beside it stand ``gap_error``, the standard error of that mean, and ``gap_in_bf16``,
the same with the FP8-trained weights judged in BF16, which leaves out what FP8 costs in the evaluation.

One pair of runs says little. The layer repeats to the bit, torch promises no such thing of attention's backward, and
two BF16 runs from one seed already end 1 to 2 % apart (docs/log.md): hence several seeds, and the error of their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TypeAlias

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from supersonic_moe import constant_weights, fp8_training
from supersonic_moe.bench.layer import OURS_BF16, recipe_name
from supersonic_moe.bench.report import OURS, CaseResult, Metrics
from supersonic_moe.config.recipe import Fp8Recipe, Recipe
from supersonic_moe.demo.data import Corpus
from supersonic_moe.demo.model import ByteTransformer
from supersonic_moe.demo.report import smoothed, smoothing_window
from supersonic_moe.demo.train import History, TrainConfig, default_config, evaluate, train_model, whole_windows

EVALUATIONS = 5
LAST = 50  # steps whose training loss is averaged
GOAL = 0.005  # the gap that FP8 may have
FP8_COLOR, BF16_COLOR = "#0b6e4f", "#c8553d"


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


Pair: TypeAlias = tuple[Run, Run]  # in FP8 and in BF16


@dataclass
class PairResult(CaseResult):
    """Both runs of one seed; what goes into the file is made of all pairs (:func:`cases`)."""

    pair: Pair = field(kw_only=True)


def config_for(device: torch.device, batch: int | None = None) -> TrainConfig:
    """The demo's configuration of this device, in bf16, since FP8 layers take nothing else, and with ``batch``
    sequences a step instead of the demo's.
    """
    config = replace(default_config(device), dtype=torch.bfloat16)
    return config if batch is None else replace(config, batch=batch)


def train(
    recipe: Recipe,
    config: TrainConfig,
    corpus: Corpus,
    steps: int,
    seed: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda _: None,
) -> Run:
    """Train one model, from the weights and on the batches of ``seed``."""
    torch.manual_seed(seed)
    model = ByteTransformer(config.model).to(device, config.dtype)
    judged = whole_windows(corpus.held_out, config.model.context)
    run, every = Run(recipe), max(1, steps // EVALUATIONS)

    def judge(steps_done: int) -> None:
        if steps_done % every == 0 or steps_done == steps:
            with constant_weights(model):
                run.held_out_bpb[steps_done] = evaluate(model, judged)
            model.train()

    def tell(_progress: float, history: History) -> None:
        bits = fmean(history.train_bpb[-20:])
        progress(f"{recipe_name(recipe)}, step {len(history.train_bpb)} of {steps}, {bits:.3f} bits per byte")

    with fp8_training(model, recipe) if isinstance(recipe, Fp8Recipe) else nullcontext():
        run.train_bpb = train_model(model, config, corpus, steps, seed, tell, after_step=judge).train_bpb
    run.held_out_in_bf16 = evaluate(model, judged) if isinstance(recipe, Fp8Recipe) else run.held_out_bpb[steps]
    return run


def gap(run: Run, bf16: Run) -> float:
    """By how much a run ends above the BF16 run; negative where it ends below."""
    end = max(bf16.held_out_bpb)
    return run.held_out_bpb[end] / bf16.held_out_bpb[end] - 1


def cases(pairs: Sequence[Pair], config: TrainConfig) -> list[CaseResult]:
    """A case for each point at which the runs were judged, of means over the pairs, then one for each pair's end, and
    last the result: the end's means and the gap.
    """
    m, (some_fp8, some_bf16) = config.model, pairs[0]
    tokens, end = config.batch * m.context, max(some_bf16.held_out_bpb)
    sizes = f"T{tokens}_H{m.hidden}_I{m.intermediate}_E{m.experts}_K{m.experts_per_token}"
    name = f"demo_{m.layers}layers_{sizes}_{recipe_name(some_fp8.recipe)}"

    def means(which: int, steps_done: int) -> Metrics:
        each = [pair[which].metrics(steps_done) for pair in pairs]
        return {metric: fmean(metrics[metric] for metrics in each) for metric in each[0]}

    found = []
    for done in some_bf16.held_out_bpb:
        found.append(CaseResult(f"{name}/{done}steps", {OURS: means(0, done), OURS_BF16: means(1, done)}))
    for i, (fp8, bf16) in enumerate(pairs):
        of_pair = {OURS: fp8.metrics(end) | {"gap": gap(fp8, bf16)}, OURS_BF16: bf16.metrics(end)}
        found.append(CaseResult(f"{name}/pair{i}", of_pair))
    gaps = [gap(fp8, bf16) for fp8, bf16 in pairs]
    result = CaseResult(name, {OURS: means(0, end), OURS_BF16: means(1, end)})
    result.metrics[OURS] |= {
        "gap": fmean(gaps),
        "gap_in_bf16": fmean(fp8.held_out_in_bf16 / bf16.held_out_bpb[end] - 1 for fp8, bf16 in pairs),
        "steps": end,
    }
    if len(pairs) > 1:
        result.metrics[OURS]["gap_error"] = stdev(gaps) / math.sqrt(len(pairs))
    return [*found, result]


def write_curve(path: Path, pairs: Sequence[Pair], title: str) -> None:
    """Left the means over the pairs, two curves that should look like one; right how far apart the runs of a pair are,
    and the mean of that, beside the goal.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    in_fp8, in_bf16 = zip(*pairs, strict=True)
    window = smoothing_window(len(in_bf16[0].train_bpb))
    for runs, color in ((in_bf16, BF16_COLOR), (in_fp8, FP8_COLOR)):
        name = recipe_name(runs[0].recipe)
        training = [fmean(bits) for bits in zip(*(run.train_bpb for run in runs), strict=True)]
        left.plot(
            smoothed(training), color=color, linewidth=1, label=f"{name}, training batches, mean of {window} steps"
        )
        held_out = _mean([run.held_out_bpb for run in runs])
        label = f"{name}, held-out files: {held_out[max(held_out)]:.4f} at the end"
        left.plot(*_points(held_out), "o", color=color, markersize=4, label=label)
    excesses = [
        {step: 100 * (fp8.held_out_bpb[step] / bits - 1) for step, bits in bf16.held_out_bpb.items()}
        for fp8, bf16 in pairs
    ]
    for i, excess in enumerate(excesses):
        right.plot(*_points(excess), color=FP8_COLOR, alpha=0.3, linewidth=1, label="" if i else "each pair of runs")
    right.plot(*_points(_mean(excesses)), "o-", color=FP8_COLOR, label=f"held-out files, mean of {len(pairs)}")
    right.axhspan(-100 * GOAL, 100 * GOAL, color="#8d99ae", alpha=0.2, label=f"± {100 * GOAL:g} %")
    top = 1.2 * max(100 * GOAL, *(abs(value) for excess in excesses for value in excess.values()))
    left.set(xlabel="step", ylabel="bits per byte", yscale="log")
    left.yaxis.set(major_formatter=ScalarFormatter(), minor_formatter=ScalarFormatter())  # 0.8, not 8 x 10^-1
    right.set(xlabel="step", ylabel="FP8 above BF16, %", ylim=(-top, top))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _mean(curves: Sequence[dict[int, float]]) -> dict[int, float]:
    return {step: fmean(curve[step] for curve in curves) for step in curves[0]}


def _points(values: dict[int, float]) -> tuple[Sequence[int], Sequence[float]]:
    return list(values), list(values.values())
