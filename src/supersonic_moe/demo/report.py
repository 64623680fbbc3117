"""What the demo shows: the live display, the closing table and the two charts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .data import Corpus
from .model import ModelConfig

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class DemoResult:
    """What the run measured. Bits per byte: lower is better, 8 is ignorance."""

    held_out_bpb: float
    bigram_bpb: float
    unigram_bpb: float
    train_bpb: tuple[float, ...]  # one a step
    tokens_per_s: float
    mfu: float | None  # None where the peak is not known: anything but Hopper
    steps: int
    seconds: float
    parameters: int
    active_parameters: int
    prompt: str
    sample: str
    paths: tuple[Path, ...]


def print_header(
    console: Console, config: ModelConfig, corpus: Corpus, parameters: int, device: torch.device, dtype: torch.dtype
) -> None:
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    console.print(
        f"[bold]supersonic-moe demo[/] · {where} · {str(dtype).removeprefix('torch.')}\n"
        f"text   Python's standard library, byte by byte: {len(corpus.train_files)} files to learn from "
        f"({len(corpus.train) / 2**20:.1f} MiB), {len(corpus.held_out_files)} others held out\n"
        f"model  {config.layers} layers of {config.experts} experts, {config.experts_per_token} for each byte; "
        f"{millions(parameters)} parameters, {millions(config.active_parameters())} of them active",
        highlight=False,
        soft_wrap=True,
    )


def millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count < 100e6 else f"{count / 1e6:.0f} M"


def load_bars(counts_E: Tensor) -> str:
    """One bar an expert; half height is a fair share of the tokens, full height twice that or more."""
    share_E = counts_E.double() * len(counts_E) / max(1, int(counts_E.sum()))
    return "".join(BARS[min(len(BARS) - 1, int(share * len(BARS) / 2))] for share in share_E.tolist())


class TrainingDisplay:
    """A progress bar with loss and speed, above the load of every expert; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("train "),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
        )
        self.task = self.progress.add_task("warming up", total=1.0)
        self.live = Live(self.progress, console=console, refresh_per_second=8)
        self.printed_tenths = 0

    def __enter__(self) -> TrainingDisplay:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def update(self, progress: float, train_bpb: list[float], tokens_per_s: float, counts_NE: Tensor) -> None:
        """``counts_NE``: tokens that each of the E experts of each of the N layers received in the last step."""
        recent = train_bpb[-20:]
        status = (
            f"step {len(train_bpb):5d}  loss {sum(recent) / len(recent):.3f} bits/byte  {tokens_per_s:9,.0f} tokens/s"
        )
        bars = [load_bars(counts_E) for counts_E in counts_NE]
        if self.console.is_terminal:
            self.progress.update(self.task, completed=progress, description=status)
            self.live.update(Group(self.progress, Text("experts  " + "  ".join(bars), style="cyan")))
        elif int(progress * 10) > self.printed_tenths:
            self.printed_tenths = int(progress * 10)
            self.console.print(
                f"train  {progress:4.0%}  {status}  experts {' '.join(bars)}", highlight=False, soft_wrap=True
            )


def print_sample(console: Console, prompt: bytes, continuation: Iterable[bytes]) -> bytes:
    """Show the text as the model writes it; returns what it wrote."""
    console.print("\n[bold]A held-out file, continued by the model[/] [dim](after ▶)[/]")
    written = b""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for piece in continuation:
            written += piece
            live.update(_source(prompt, written), refresh=True)
    console.print(_source(prompt, written))
    return written


def _source(prompt: bytes, written: bytes) -> Syntax:
    text = prompt.decode("utf-8", "replace") + "▶" + written.decode("utf-8", "replace")
    visible = "".join(char if char.isprintable() or char == "\n" else "·" for char in text)
    return Syntax(visible, "python", theme="ansi_dark", word_wrap=True, background_color="default")


def print_result(console: Console, result: DemoResult, flops_per_s: float) -> None:
    """Model against n-grams on the held-out files, speed, and where the charts are."""
    saved = 1 - result.held_out_bpb / result.bigram_bpb
    console.print()
    table = Table(title="Held-out bits per byte (lower is better)", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    table.add_row(
        "this model",
        f"[bold green]{result.held_out_bpb:.3f}[/]",
        f"{saved:.0%} below the bigram" if saved > 0 else "not yet below the bigram",
    )
    table.add_row("bigram", f"{result.bigram_bpb:.3f}", "best guess from one byte of context")
    table.add_row("unigram", f"{result.unigram_bpb:.3f}", "best guess from none")
    console.print(table)
    speed = f"{result.steps:,} {'step' if result.steps == 1 else 'steps'}"
    if result.tokens_per_s > 0:  # 0: too few steps to tell
        rate = f"{flops_per_s / 1e12:.0f} TFLOP/s" if flops_per_s > 1e12 else f"{flops_per_s / 1e9:.0f} GFLOP/s"
        speed += f" · {result.tokens_per_s:,.0f} tokens/s · {rate}"
    if result.mfu:
        speed += f" · MFU {result.mfu:.1%} (active FLOPs over 989 TFLOP/s, the bf16 peak)"
    console.print(f"{speed} · {result.seconds:.0f} s in all", highlight=False)
    console.print("charts: " + ", ".join(str(path) for path in result.paths), highlight=False, soft_wrap=True)


def smoothing_window(steps: int) -> int:
    """Steps whose mean :func:`smoothed` takes: a fortieth of the run, an odd number."""
    return 2 * (steps // 80) + 1


def smoothed(values: list[float]) -> list[float]:
    """Means over a window around each value. Near the ends it shrinks on both sides, so the curve begins and ends where
    the values do.
    """
    sums, reach = [0.0, *itertools.accumulate(values)], smoothing_window(len(values)) // 2
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append((sums[i + near + 1] - sums[i - near]) / (2 * near + 1))
    return means


def plot_loss(path: Path, train_bpb: list[float], held_out: float, bigram: float, unigram: float) -> Path:
    """Training loss over steps, raw and smoothed, with the held-out score and the n-gram models as level lines."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    window = smoothing_window(len(train_bpb))
    axes.plot(train_bpb, color="tab:blue", alpha=0.3, linewidth=0.8, label="training batches, each step")
    if window > 1:
        axes.plot(smoothed(train_bpb), color="tab:blue", label=f"training batches, mean of {window} steps")
    for name, level, color in (
        ("unigram", unigram, "tab:gray"),
        ("bigram", bigram, "tab:red"),
        ("this model", held_out, "tab:green"),
    ):
        axes.axhline(level, color=color, linestyle="--", label=f"{name}, held-out files: {level:.2f}")
    axes.set(
        xlabel="step",
        ylabel="bits per byte",
        title="Learning Python source, byte by byte",
        xlim=(0, max(1, len(train_bpb) - 1)),
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def plot_expert_load(path: Path, counts_SNE: Tensor, columns: int = 200) -> Path:
    """A heat map of experts × steps for each layer: the tokens that an expert received over its fair share."""
    steps, layers, experts = counts_SNE.shape
    groups = counts_SNE.double().tensor_split(min(steps, columns))
    load_CNE = torch.stack([group.sum(0) for group in groups])
    load_CNE = load_CNE * experts / load_CNE.sum(-1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(8, 1.2 + 1.3 * layers), layout="constrained")
    panels = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    for layer, axes in enumerate(panels):
        image = axes.imshow(
            load_CNE[:, layer].T.numpy(), aspect="auto", origin="lower", cmap="RdBu_r", vmin=0, vmax=2,
            extent=(0, steps, -0.5, experts - 0.5), interpolation="nearest",
        )  # fmt: skip
        axes.set_ylabel(f"layer {layer}\nexpert")
    panels[-1].set_xlabel("step")
    figure.suptitle("Expert load: tokens received over a fair share")
    figure.colorbar(image, ax=list(panels), ticks=[0, 1, 2]).ax.set_yticklabels(["0", "1 (fair)", "≥ 2"])
    figure.savefig(path, dpi=150)
    return path
