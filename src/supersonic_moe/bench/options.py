"""The options that several commands share, and how their text becomes arguments.

Whatever a user can get wrong becomes one sentence and exit code 2, never a traceback. Nothing here imports torch at the
top: ``--help`` would wait for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from supersonic_moe.bench.shapes import CPU_LAYER_SHAPES
from supersonic_moe.config.recipe import Bf16Recipe, Fp8Recipe, Recipe
from supersonic_moe.perf_model import LayerShape

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
CHARTS = (".png", ".svg", ".pdf")


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be made in a folder. It is made if need be: nothing else tells whether it can be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror


def writable_folder(folder: Path) -> Path:
    """``folder``, made if need be. Asked before the work starts: afterwards its results would be lost."""
    if reason := why_not_writable(folder):
        raise typer.BadParameter(f"cannot write to {folder}: {reason}. Choose another folder.")
    return folder


def _writable_file(path: Path | None) -> Path | None:
    if path is not None:
        if path.is_dir():
            raise typer.BadParameter(f"cannot write to {path}: it is a folder. Add the name of a file.")
        writable_folder(path.parent)
    return path


def _writable_chart(path: Path | None) -> Path | None:
    path = _writable_file(path)
    if path is not None and path.suffix not in CHARTS:
        raise typer.BadParameter(f"a chart is a file in {', '.join(CHARTS)}; got {path}. Change its ending.")
    return path


Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="T,H,I,E,K", help="Tokens, hidden, intermediate, experts, top-k. Repeatable."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: the GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32. Default: bfloat16, on a CPU float32.")]
Activation = Annotated[
    str, typer.Option(help="swiglu, geglu, geglu_tanh, reglu, relu_sq, relu, gelu, gelu_tanh or silu.")
]
Backend = Annotated[
    str, typer.Option(help="Kernels of our layer: auto (also called sonicmoe), sm90, triton or torch (the reference).")
]

RecipeName = Annotated[str, typer.Option("--recipe", help="Numbers that the experts multiply: bf16 or fp8.")]
Saved = Annotated[
    str | None,
    typer.Option("--save-preactivation", help="FP8: how the pre-activation is kept, as fp8, int8, bf16 or recompute."),
]
Wgrad = Annotated[str | None, typer.Option("--wgrad", help="FP8: weight gradients are multiplied in fp8 or bf16.")]
Scale = Annotated[str | None, typer.Option("--scale", help="FP8: scales of blocks are fp32 or pow2.")]

Json = Annotated[Path | None, typer.Option(help="Write every number here, case by case.", callback=_writable_file)]
Png = Annotated[Path | None, typer.Option(help="Write a chart here, at the end.", callback=_writable_chart)]
Markdown = Annotated[
    Path | None, typer.Option(help="Write the table here, as a page, case by case.", callback=_writable_file)
]
MinMs = Annotated[float, typer.Option(min=0, help="Timed work of each contender, milliseconds.")]
WarmMs = Annotated[float, typer.Option(min=0, help="Load before anything is timed, milliseconds.")]
Pairs = Annotated[
    int,
    typer.Option(
        min=4,
        help="Slices of each contender in training, alternating. From 6 on, ratios in the file have a 95 % interval.",
    ),
]
Commit = Annotated[
    str | None, typer.Option(help="Commit to record where the tree is a copy without .git. Default: ask git.")
]


@contextmanager
def usage_errors(option: str | None = None) -> Iterator[None]:
    """The library's own argument checks say constraint, value and fix; show that instead of where it was raised."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def shapes(texts: Sequence[str] | None) -> list[LayerShape]:
    with usage_errors("--shape"):
        return [LayerShape.parse(text) for text in texts or ()]


def shapes_or(texts: Sequence[str] | None, default: Sequence[LayerShape], where: torch.device) -> Sequence[LayerShape]:
    """Those asked for, else the default or, on a CPU, what a CPU can do in seconds."""
    return shapes(texts) or (default if where.type == "cuda" else CPU_LAYER_SHAPES)


def peers(text: str, known: str) -> list[str]:
    """The names that a user gave with commas, each of ``known``; none for ``none``."""
    asked = [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in known.split(",")]:
        raise ValueError(f"peers are {known} or none; got {', '.join(unknown)}.")
    return asked


def device(name: str | None) -> torch.device:
    """The named device, else the GPU if there is one, else the CPU."""
    import torch

    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"a device is cpu, cuda or cuda:N; got {name!r}.", param_hint="--device") from None
    if chosen.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"only cpu and cuda devices are supported; got {name!r}.", param_hint="--device")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise typer.BadParameter(f"torch sees {gpus} CUDA GPUs; got {name!r}. Use --device cpu.", param_hint="--device")
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def dtype(name: str | None, where: torch.device, recipe: Recipe | None = None) -> torch.dtype:
    """The named dtype, else bfloat16 on a GPU and float32 on a CPU. An FP8 layer takes bfloat16 only."""
    import torch

    fp8 = isinstance(recipe, Fp8Recipe)
    if fp8 and name not in (None, "bfloat16"):
        raise typer.BadParameter(f"an FP8 layer takes bfloat16; got {name!r}.", param_hint="--dtype")
    if name is None:
        return torch.bfloat16 if fp8 or where.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise typer.BadParameter(f"a dtype is one of {', '.join(DTYPES)}; got {name!r}.", param_hint="--dtype")
    chosen: torch.dtype = getattr(torch, name)
    return chosen


def recipe(name: str, saved: str | None, wgrad: str | None, scale: str | None) -> Recipe:
    """The numeric recipe of that name, with the options that were given."""
    given = {"save_preactivation": saved, "wgrad": wgrad, "scale": scale}
    changes = {field: value for field, value in given.items() if value is not None}
    if name not in ("bf16", "fp8"):
        raise typer.BadParameter(f"a recipe is bf16 or fp8; got {name!r}.", param_hint="--recipe")
    if name == "bf16":
        if changes:
            option = "--" + next(iter(changes)).replace("_", "-")
            raise typer.BadParameter("only an FP8 layer has this choice. Add --recipe fp8.", param_hint=option)
        return Bf16Recipe()
    with usage_errors():
        return Fp8Recipe(**changes)  # type: ignore[arg-type]
