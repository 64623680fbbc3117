"""``bench layer``, measured by ``bench/layer.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer
from rich.console import RenderableType

from supersonic_moe.bench import options
from supersonic_moe.bench.shapes import LAYER_SETS
from supersonic_moe.bench.suite import Progress, RecipeOptions, Timed
from supersonic_moe.perf_model import LayerShape

if TYPE_CHECKING:
    from supersonic_moe.bench.layer import LayerConfig, LayerResult

PEERS = "torch_loop,grouped_mm,sonicmoe,liger"
FP8_PEERS = "torchao"


@dataclass(frozen=True, kw_only=True)
class Layer(RecipeOptions, Timed[LayerShape, "LayerResult"]):
    """One MoE layer, router included: forward, forward + backward, GPU-busy time, memory, TFLOP/s, MFU, watts."""

    name = "layer"
    files: ClassVar = {
        "layer-bf16": {"peers": "all", "pairs": 20},
        "layer-fp8": {"recipe": "fp8", "peers": "all", "pairs": 20},
        "layer-short": {"recipe": "fp8", "set_name": "short", "peers": "none", "pairs": 20},
    }

    shape: options.Shapes = None
    set_name: Annotated[
        str | None,
        typer.Option(
            "--set",
            help="default: five layers of real models; fine-grained: small experts; short: few tokens.",
        ),
    ] = None
    activation: options.Activation = "swiglu"
    dtype: options.Dtype = None
    router: Annotated[
        str,
        typer.Option(
            help="softmax_after_topk, softmax_before_topk, softmax_before_topk_renormalized, sigmoid_grouped_topk or "
            "token_rounding (NR-f, tile 128), which is timed beside plain top-k."
        ),
    ] = "softmax_after_topk"
    skew: Annotated[
        float, typer.Option(min=0, help="Spread of the experts' popularity; 0 is uniform, 1 is strong.")
    ] = 0
    backend: options.Backend = "auto"
    peers: Annotated[
        str,
        typer.Option(
            help="Of torch_loop and grouped_mm, two layers in plain PyTorch, and sonicmoe, liger and, in FP8, torchao, "
            "where installed; with commas, or all or none."
        ),
    ] = "torch_loop,grouped_mm"
    pairs: options.Pairs = 4
    cold_l2: Annotated[bool, typer.Option("--cold-l2", help="Flush the L2 cache before every timed call.")] = False
    png: options.Png = None

    @cached_property
    def config(self) -> LayerConfig:
        from supersonic_moe.bench.layer import LayerConfig

        return LayerConfig(
            device=self.where,
            dtype=options.dtype(self.dtype, self.where, self.numerics),
            recipe=self.numerics,
            activation=self.activation,
            router=self.router,
            skew=self.skew,
            backend=self.backend,
            peers=self._peers(),
            pairs=self.pairs,
            warm_ms=self.warm_ms,
            min_ms=self.min_ms,
            cold_l2=self.cold_l2,
        )

    def _peers(self) -> list[str]:
        fp8 = "," + FP8_PEERS if self.recipe == "fp8" else ""
        return [name for name in {"all": PEERS + fp8, "none": ""}.get(self.peers, self.peers).split(",") if name]

    @property
    def heading(self) -> str:
        c = self.config
        return f"MoE layer on {self.machine}, {c.dtype_name}, {c.activation}, {c.router}"

    @property
    def method(self) -> str:
        cold = " Cold L2." if self.cold_l2 else ""
        return f"{super().method}{cold} In parentheses: how many times less ours takes."

    def cases(self) -> Sequence[LayerShape]:
        self.config.check()
        if self.set_name is None:
            return options.shapes_or(self.shape, LAYER_SETS["default"], self.where)
        if self.shape:
            raise ValueError("choose shapes by --shape or by --set, not both.")
        if self.set_name not in LAYER_SETS:
            raise ValueError(f"a set is one of {', '.join(LAYER_SETS)}; got {self.set_name!r}.")
        return LAYER_SETS[self.set_name]

    def run(self, case: LayerShape, progress: Progress) -> LayerResult:
        from supersonic_moe.bench.layer import run_case

        return run_case(case, self.config, progress)

    def summary(self, results: Sequence[LayerResult]) -> Iterable[RenderableType]:
        from supersonic_moe.bench.report import summary_tables

        return summary_tables(results, "fwd_bwd_us", "fwd_bwd_tflops")

    def figure(self, results: Sequence[LayerResult]) -> Sequence[Path]:
        if self.png is None:
            return ()
        from supersonic_moe.bench.bar_chart import Panel, dense_products, write_png
        from supersonic_moe.bench.layer import machine_of

        ceilings = dense_products(machine_of(self.where, self.config.dtype), fp8=self.config.fp8)
        panels = [
            Panel("forward", "fwd_tflops", results),
            Panel("forward + backward", "fwd_bwd_tflops", results),
        ]
        return [write_png(self.png, panels, self.heading, ceilings)]
