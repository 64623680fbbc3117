"""The run behind ``make demo``: train for a fixed time, then show what was learnt.

Two configurations, picked by the device: a small fp32 one that two CPU cores train in under two minutes, and a larger
bf16 one for a CUDA GPU. The learning rate follows *progress*, the fraction of the budget that is spent, so a run ends
well annealed on a slow machine and on a fast one. Given ``steps`` instead of a time, a run is deterministic.

FLOPs and MFU: training costs 6 FLOPs per token and active weight (an expert that a token is not sent to costs nothing)
plus causal attention, see ``ModelConfig.train_flops_per_token``. MFU is that, times tokens/s, over 989 TFLOP/s, the
dense bf16 peak of H100 and H200.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from . import report
from .data import Corpus, bigram_bits_per_byte, sample_batch, split, standard_library, unigram_bits_per_byte
from .model import ByteTransformer, ModelConfig

HOPPER_PEAK_FLOPS = 989e12


@dataclass(frozen=True)
class TrainConfig:
    """Everything the run needs to know. The defaults are for two CPU cores: three minutes in all, set-up included."""

    model: ModelConfig
    dtype: torch.dtype = torch.float32
    batch: int = 4  # sequences
    seconds: float = 90.0
    max_passes: float = 4.0  # over the text: up to four, repeated text is nearly as good as new (arXiv 2305.16264)
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    warmup: float = 0.05  # of the run
    aux_weight: float = 0.01  # of the load-balancing loss (Switch Transformer, arXiv 2101.03961)
    train_bytes: int = 16 << 20
    held_out_bytes: int = 96 << 10
    sample_bytes: int = 320
    read_every: int = 1  # steps between two readings of the loss, each of which waits for the device


def default_config(device: torch.device) -> TrainConfig:
    """The CPU's configuration, or for a GPU 0.84 billion parameters, 0.13 billion of them active."""
    if device.type != "cuda":
        return TrainConfig(ModelConfig())
    # Weights and optimizer state take ~16 GiB, activations ~0.6 GiB a sequence; 64 sequences are 64 Ki tokens.
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return TrainConfig(
        ModelConfig(context=1024, hidden=1024, layers=8, heads=16, experts=64, experts_per_token=8, intermediate=512),
        dtype=torch.bfloat16,
        batch=min(64, max(4, int(gib) - 20)),
        seconds=75.0,
        learning_rate=6e-4,
        warmup=0.1,
        held_out_bytes=512 << 10,
        read_every=10,
    )


class MasterAdamW:
    """AdamW on an fp32 copy of every bf16 weight, in whose 8 bits small updates would vanish."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.weights = list(model.parameters())
        self.masters = [w if w.dtype == torch.float32 else nn.Parameter(w.detach().float()) for w in self.weights]
        self.adamw = torch.optim.AdamW(
            [
                {"params": [w for w in self.masters if w.dim() > 1], "weight_decay": config.weight_decay},
                {"params": [w for w in self.masters if w.dim() == 1], "weight_decay": 0.0},  # norm gains
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def step(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = weight.grad if weight.grad is None else weight.grad.to(master.dtype)
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adamw.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                if weight is not master:
                    weight.copy_(master)
                weight.grad = None


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    warm = min(1.0, progress / config.warmup) if config.warmup else 1.0
    return config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def run(
    *,
    steps: int | None = None,
    seconds: float | None = None,
    device: str | None = None,
    out: Path = Path("demo-out"),
    seed: int = 0,
    config: TrainConfig | None = None,
    corpus: Corpus | None = None,
    console: Console | None = None,
) -> report.DemoResult:
    """Train, evaluate, sample and plot.

    Args:
        steps: train this many steps instead of for a time: the same result on every run.
        seconds: time budget of the training loop, evaluation and sample not included; None takes the config's.
        device: ``"cpu"``, ``"cuda"``, …; None takes the GPU if there is one.
        out: folder for ``loss.png`` and ``expert_load.png``, made if need be.
        seed: of the weights, the batches and the sample.
        config, corpus: instead of what the device suggests and the standard library.
        console: where to print.
    """
    begin = time.perf_counter()
    for name, value in (("steps", steps), ("seconds", seconds)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive; got {value}. Leave it out for the default budget.")
    console = console or Console()
    place = _device(device)
    config = config or default_config(place)
    if seconds is not None:
        config = replace(config, seconds=seconds)
    corpus = corpus or corpus_for(config)
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(seed)
    model = ByteTransformer(config.model).to(place, config.dtype)
    parameters = sum(weight.numel() for weight in model.parameters())
    report.print_header(console, model.config, corpus, parameters, place, config.dtype)

    with report.TrainingDisplay(console) as display:

        def show(progress: float, history: History) -> None:
            display.update(progress, history.train_bpb, history.tokens_per_s(), history.expert_counts[-1])

        history = train_model(model, config, corpus, steps, seed, show)

    with console.status("Reading the held-out files…"):
        judged = whole_windows(corpus.held_out, config.model.context)  # the same bytes for all three
        held_out_bpb = evaluate(model, judged)
        bigram = bigram_bits_per_byte(corpus.train, judged)
        unigram = unigram_bits_per_byte(corpus.train, judged)
    prompt = held_out_prompt(corpus.held_out, config.model.context // 2)
    sample = report.print_sample(console, prompt, model.generate(prompt, config.sample_bytes, seed=seed))
    with console.status("Drawing…"):
        paths = (
            report.plot_loss(out / "loss.png", history.train_bpb, held_out_bpb, bigram, unigram),
            report.plot_expert_load(out / "expert_load.png", torch.stack(history.expert_counts)),
        )
    on_hopper = place.type == "cuda" and torch.cuda.get_device_capability(place) == (9, 0)
    flops_per_s = history.tokens_per_s() * model.config.train_flops_per_token()
    result = report.DemoResult(
        held_out_bpb=held_out_bpb,
        bigram_bpb=bigram,
        unigram_bpb=unigram,
        train_bpb=tuple(history.train_bpb),
        tokens_per_s=history.tokens_per_s(),
        mfu=flops_per_s / HOPPER_PEAK_FLOPS if on_hopper else None,
        steps=len(history.train_bpb),
        seconds=time.perf_counter() - begin,
        parameters=parameters,
        active_parameters=model.config.active_parameters(),
        prompt=prompt.decode("utf-8", "replace"),
        sample=sample.decode("utf-8", "replace"),
        paths=paths,
    )
    report.print_result(console, result, flops_per_s)
    return result


class History:
    """Loss and expert load of every step; they stay on the device until ``read``, the loop's only wait for it."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.train_bpb: list[float] = []
        self.expert_counts: list[Tensor] = []  # (layers, E) a step
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._marks: list[tuple[float, int]] = []  # (time, steps done) at each reading

    def add(self, loss: Tensor, expert_counts: Tensor) -> None:
        self._unread.append((loss.detach() / math.log(2), expert_counts))

    def read(self) -> None:
        if self._unread:
            losses, counts = zip(*self._unread, strict=True)
            self.train_bpb += torch.stack(losses).tolist()
            self.expert_counts += torch.stack(counts).cpu().unbind()
            self._unread = []
            self._marks.append((time.perf_counter(), len(self.train_bpb)))

    def tokens_per_s(self) -> float:
        """Over the last two thirds of the readings, hence without start-up; 0 before two readings."""
        if len(self._marks) < 2:
            return 0.0
        (start, first), (end, last) = self._marks[len(self._marks) // 3], self._marks[-1]
        return (last - first) * self.tokens_per_step / (end - start)


def corpus_for(config: TrainConfig) -> Corpus:
    return split(standard_library(), train_bytes=config.train_bytes, held_out_bytes=config.held_out_bytes)


def train_model(
    model: ByteTransformer,
    config: TrainConfig,
    corpus: Corpus,
    steps: int | None,
    seed: int,
    show: Callable[[float, History], None],
    after_step: Callable[[int], None] = lambda _: None,
) -> History:
    """For ``steps``, or for the time of the config. ``show`` gets the progress in [0, 1] at each reading of the loss,
    ``after_step`` the number of steps done.
    """
    optimizer = MasterAdamW(model, config)
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    history = History(tokens_per_step=config.batch * config.model.context)
    most_steps = steps or max(1, int(config.max_passes * len(corpus.train) / history.tokens_per_step))
    model.train()
    for step, progress in _spend(most_steps, math.inf if steps else config.seconds):
        batch_BL = sample_batch(corpus.train, config.batch, config.model.context, generator).to(device)
        logits_BLV, aux_loss = model(batch_BL[:, :-1])
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), batch_BL[:, 1:].flatten())
        (loss + config.aux_weight * aux_loss).backward()
        optimizer.step(learning_rate(config, progress))
        history.add(loss, model.expert_counts())
        after_step(step + 1)
        if step % config.read_every == 0:
            history.read()
            show(progress, history)
    history.read()
    show(1.0, history)
    return history


def _spend(steps: int, seconds: float) -> Iterator[tuple[int, float]]:
    """(step, progress in [0, 1)) until the steps or the seconds run out."""
    begin = time.perf_counter()
    for step in range(steps):
        progress = max(step / steps, (time.perf_counter() - begin) / seconds)
        if progress >= 1:
            return
        yield step, progress


def whole_windows(text: Tensor, context: int) -> Tensor:
    """``text`` without the bytes at its end that :func:`evaluate` would not reach."""
    half = context // 2
    return text[: (len(text) - 1) // half * half + 1]


@torch.no_grad()
def evaluate(model: ByteTransformer, text: Tensor, batch: int = 16) -> float:
    """Bits per byte of ``text``: each byte is predicted once, from at least half a context of bytes (but at the start).

    A window of L bytes begins every L/2 bytes; all windows but the first are scored on their second half only.
    """
    model.eval()
    length = model.config.context
    half = length // 2
    starts = torch.arange(0, len(text) - length, half)
    bits = torch.zeros((), dtype=torch.float64)
    for starts_B in torch.split(starts, batch):
        window_BL = text[starts_B[:, None] + torch.arange(length + 1)].long().to(model.embedding.weight.device)
        logits_BLV, _ = model(window_BL[:, :-1])
        loss_BL = F.cross_entropy(logits_BLV.float().transpose(1, 2), window_BL[:, 1:], reduction="none")
        scored = loss_BL[:, half:].sum() + (loss_BL[0, :half].sum() if starts_B[0] == 0 else 0.0)
        bits += scored.double().cpu() / math.log(2)
    return bits.item() / (len(starts) * half + half)


def held_out_prompt(text: Tensor, length: int, cue: bytes = b"    def __init__(self, ") -> bytes:
    """At most ``length`` bytes of held-out text: the lines up to its first ``cue``, or its beginning if it has none."""
    held_out = text.numpy().tobytes()
    end = held_out.find(cue, length) + len(cue)
    if end < len(cue):
        return held_out[:length]
    line = held_out.find(b"\n", end - length, end) + 1
    return held_out[line or end - length : end]


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} needs a CUDA GPU; torch {torch.__version__} sees none. Use device='cpu'.")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device
