"""FP8 in the benchmarks: floors, the layer beside its BF16 twin, the breakdown of a step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUICK, run

from supersonic_moe import Bf16Recipe, Fp8Recipe
from supersonic_moe.bench import breakdown, layer, report, spans
from supersonic_moe.bench.layer import OURS_BF16, LayerConfig, recipe_name
from supersonic_moe.bench.report import OURS
from supersonic_moe.bench.shapes import LAYER_SETS
from supersonic_moe.kernels import reference, registry
from supersonic_moe.perf_model import (
    H200,
    LayerShape,
    fp8_saved_bytes,
    fp8_step_kernels,
    fp8_steps,
    kernel_steps,
    layer_flops,
)

CPU = torch.device("cpu")
REFERENCE = LayerShape(8192, 3072, 1536, 8, 8)
SMALL = LayerShape(64, 256, 128, 4, 2)
RECIPES = [
    Fp8Recipe(wgrad="bf16"),
    Fp8Recipe(wgrad="fp8", scale="pow2"),
    Fp8Recipe(save_preactivation="recompute", wgrad="fp8"),
]


def quick(recipe: Fp8Recipe | None = None, **changes: Any) -> LayerConfig:
    usual: dict[str, Any] = dict(recipe=recipe or Fp8Recipe(), peers=(), warm_ms=0, min_ms=0)
    return LayerConfig(CPU, torch.bfloat16, **(usual | changes))


# ---- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
def test_steps_are_the_flops_of_the_layer(gated: bool) -> None:
    for recipe in RECIPES:
        steps = {step.key: step for step in fp8_steps(SMALL, recipe, gated=gated)}
        assert sum(steps[key].flops for key in "12345678") == layer_flops(SMALL, gated=gated)[1]
        assert steps.keys() - {"router", "d router"} == fp8_step_kernels(recipe).keys()
        assert steps["5"].fp8 == (recipe.wgrad == "fp8")
    assert steps["1'"].flops == steps["1"].flops and steps["1'"].phase == "backward"


def test_reference_shape_by_hand() -> None:
    step = {s.key: s for s in fp8_steps(REFERENCE, RECIPES[0], gated=True)}
    x, w1, a, h = 8192 * 3072, 8 * 3072 * 3072, 65536 * 1536, 65536 * 3072
    assert step["1"].bytes == x + w1 + a + h + (x + a + h) // 32 + 4 * 65536  # a scale for 128 elements; an index
    assert step["1"].roofline_us(H200) == pytest.approx(963.4, abs=0.1) and step["1"].bound(H200) == "compute"
    assert step["7"].roofline_us(H200) == pytest.approx(1819, abs=1)  # in bf16
    assert step["q dH"].bytes == 65536 * (3 * 3072 + 4 * 24)
    kernels = kernel_steps(REFERENCE, gated=True)
    assert step["q W"].bytes == kernels["quantize_blocks_w1"].bytes + kernels["quantize_blocks_w2"].bytes
    activations, copies = fp8_saved_bytes(REFERENCE, Fp8Recipe(), gated=True)
    assert activations == 2 * x + h + h // 32 and copies == 8 * 3072 * 1536 * 3


# ---- the layer suite -------------------------------------------------------------------------------------------------


def test_fp8_meets_our_bf16_layer_with_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    forward = layer.MoE.forward

    def spy(self: layer.MoE, *args: Any, **kwargs: Any) -> Any:
        seen.add((type(self.recipe), self.c_fc.weight.data_ptr()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(layer.MoE, "forward", spy)
    recipe = Fp8Recipe(wgrad="fp8", save_preactivation="bf16")
    result = layer.run_case(SMALL, quick(recipe))
    assert result.case == f"T64_H256_I128_E4_K2_{recipe_name(recipe)}" and result.missing == {}
    assert list(result.metrics) == [OURS, OURS_BF16]
    assert {kind for kind, _ in seen} == {Fp8Recipe, Bf16Recipe} and len({address for _, address in seen}) == 1
    ours, bf16 = result.metrics[OURS], result.metrics[OURS_BF16]
    assert 0 < ours["quantize_share"] < 1 and "quantize_share" not in bf16
    assert ours["saved_bytes"] / bf16["saved_bytes"] == ours["saved_of_formula"] / bf16["saved_of_formula"]


def test_weights_that_are_held_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rounds of forward + backward, beside the peers' times of them; everywhere else in every forward."""
    quantized, original = [], layer.MoE.forward

    def spy(self: layer.MoE, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        quantized.append((id(self), self.weight_cache._holds, len(self.weight_cache._entries)))
        return result

    monkeypatch.setattr(layer.MoE, "forward", spy)
    result = layer.run_case(SMALL, replace(quick(Fp8Recipe()), pairs=6))
    held = [entries for _, holds, entries in quantized if holds]
    assert len({name for name, holds, _ in quantized if holds}) == 1 and set(held) == {2}
    assert all(entries == 0 for _, holds, entries in quantized if not holds)
    ours, bf16 = result.metrics[OURS], result.metrics[OURS_BF16]
    assert ours["held_us"] > 0 and ours["held_us"] != ours["fwd_bwd_us"] and bf16["held_us"] == bf16["fwd_bwd_us"]
    assert list(result.metrics) == [OURS, OURS_BF16] and ("held_us", OURS_BF16) in result.pairs
    rows = {row.metric: row for row in report.rows(result)}
    assert rows["held_us"].peer == OURS_BF16 and rows["held_us"].interval is not None
    assert "held_us" not in layer.run_case(SMALL, quick(Bf16Recipe())).metrics[OURS]


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_name)
def test_saved_bytes_are_those_of_the_model(recipe: Fp8Recipe) -> None:
    shape = LayerShape(256, 256, 128, 4, 2)
    metrics = layer.run_case(shape, quick(recipe)).metrics[OURS]
    activations, copies = fp8_saved_bytes(shape, recipe, gated=True)
    metadata = 4 * (10 * shape.rows + 3 * shape.tokens * shape.experts) + 4 * 3 * 4 * 2 * 2  # and scales of weights
    assert activations <= metrics["saved_bytes"] <= activations + metadata
    assert metrics["weight_copy_bytes"] == copies


def test_names_say_what_differs_from_the_default_recipe() -> None:
    assert recipe_name(Bf16Recipe()) == "bf16" and recipe_name(Fp8Recipe()) == "fp8"
    odd = Fp8Recipe(scale="pow2", save_preactivation="recompute", keep_transposed=False)
    assert recipe_name(odd) == "fp8_scale-pow2_z-recompute_kept-False"
    assert {recipe_name(Fp8Recipe(wgrad=wgrad))[:10] for wgrad in ("bf16", "fp8")} == {"fp8", "fp8_wgrad-"}
    assert {512, 1024, 2048} <= {shape.tokens for shape in LAYER_SETS["short"]}


def test_command_writes_the_baseline_by_name(tmp_path: Path) -> None:
    file, chart = tmp_path / "layer-fp8.json", tmp_path / "layer.png"
    shape = ["--shape", "64,256,128,4,2", *QUICK]
    result = run(
        "bench", "layer", "--recipe", "fp8", *shape, "--peers", "", "--json", str(file), "--png", str(chart)
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "ours-BF16" in result.output and chart.is_file()
    content = json.loads(file.read_text())
    rows = {row["metric"]: row for row in content["rows"]}
    assert content["suite"] == "layer" and {row["peer"] for row in content["rows"]} == {OURS_BF16}
    speedup = rows["fwd_bwd_us"]
    assert speedup["ratio"] == pytest.approx(speedup["peer_value"] / speedup["value"], rel=1e-4)
    assert {"saved_bytes", "saved_of_formula", "quantize_share"} <= rows.keys()


# ---- the breakdown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [*RECIPES, Bf16Recipe()], ids=recipe_name)
def test_every_step_is_found(recipe: Any) -> None:
    untouched = dict(vars(reference))
    result = breakdown.run_case(SMALL, quick(recipe))
    assert dict(vars(reference)) == untouched, "the functions are put back"
    wanted = [(function, step.key) for function, step in breakdown.floor_steps(SMALL, recipe, gated=True)]
    found = [line.split(" ", 1)[1] for line in result.metrics if line[0].isdigit()]
    with_floor = [line for line in found if "(" in line]
    assert sorted(with_floor) == sorted(f"{function} ({key})" for function, key in wanted)
    assert isinstance(recipe, Bf16Recipe) or with_floor == [f"{function} ({key})" for function, key in wanted]
    assert sum(metrics["share"] for line, metrics in result.metrics.items() if line != "total") == pytest.approx(1)
    assert all(metrics["us"] > 0 for metrics in result.metrics.values())


def test_spans_are_medians_of_what_each_function_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two functions of known duration on a clock of their own, and 3 µs of nobody's."""
    now, extra = 0.0, iter([0, 0, 0, 0, 7, 0, 0, 0])
    delays = []

    class Clock(spans.Marks):
        def mark(self) -> float:
            return now

        def us(self, begin: float, end: float) -> float:
            return end - begin

        def delay(self, us: float) -> None:
            delays.append(us)

    module: Any = registry.kernels("reference").fp8

    def takes(us: float) -> Any:
        def function() -> None:
            nonlocal now
            now += us

        return function

    monkeypatch.setattr(module, "pick", takes(5))
    monkeypatch.setattr(module, "quantize_rows", takes(2))

    def call() -> None:
        nonlocal now
        module.pick()
        module.quantize_rows()
        now += 3 + next(extra)
        module.quantize_rows()

    measured = spans.measure_spans(call, Clock(), warm_ms=0, min_ms=0.05)
    assert measured.parts == [("pick", 5), ("quantize_rows", 2), ("quantize_rows", 2)]
    assert measured.us == 12 and measured.quantize_share == pytest.approx(4 / 12)
    assert len(delays) == 5 and min(delays) > 12, "twelve microseconds are less than the host needs"


def test_breakdown_command_prints_and_writes(tmp_path: Path) -> None:
    file = tmp_path / "breakdown.json"
    shape = ["--shape", "64,256,128,4,2", *QUICK]
    result = run("bench", "breakdown", "--recipe", "fp8", *shape, "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "up_projection_fp8 (1)" in result.output and "only quantizing or transposing" in result.output
    content = json.loads(file.read_text())
    names = list(dict.fromkeys(row["case"].partition("/")[2] for row in content["rows"]))
    assert content["suite"] == "breakdown" and names[-2:] == ["rest", "total"]


@pytest.mark.gpu
def test_commands_on_a_gpu(device: torch.device, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    layer_file, step_file = tmp_path / "layer.json", tmp_path / "step.json"
    short = ["--recipe", "fp8", "--shape", "2048,1024,512,8,2", "--min-ms", "40", "--warm-ms", "40"]
    result = run("bench", "layer", *short, "--peers", "", "--json", str(layer_file))
    assert result.exit_code == 0, result.output
    rows = {row["metric"]: row for row in json.loads(layer_file.read_text())["rows"]}
    assert {
        "mfu",
        "busy_us",
        "wall_over_busy",
        "graph_us",
        "peak_bytes",
        "saved_of_formula",
        "quantize_share",
    } <= rows.keys()
    ours, bf16, times = rows["mfu"]["value"], rows["mfu"]["peer_value"], rows["fwd_bwd_us"]
    assert ours / bf16 == pytest.approx(times["peer_value"] / times["value"] * 989 / 1979, rel=1e-3)

    result = run("bench", "breakdown", *short, "--wgrad", "bf16", "--json", str(step_file))
    assert result.exit_code == 0, result.output
    lines = json.loads(step_file.read_text())["rows"]
    floors = {row["case"].partition(" ")[2]: row["value"] for row in lines if row["metric"] == "of_floor"}
    assert {"up_projection_fp8 (1)", "down_backward_fp8 (4)", "quantize_rows (q dH)"} <= floors.keys()
    assert all(0 < value < 2 for value in floors.values())
