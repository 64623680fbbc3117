"""The precision suite on a CPU: every combination, errors that see what is wrong, files and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import QUICK, run
from fp8_oracle import LIMITS, cosine
from fp8_oracle import error as relative

from supersonic_moe import Bf16Recipe, Fp8Recipe
from supersonic_moe.bench import precision
from supersonic_moe.bench.layer import OURS_BF16, LayerConfig, recipe_name
from supersonic_moe.bench.precision import INPUTS, RECIPES, TENSORS, Layer, PrecisionResult, run_case
from supersonic_moe.kernels import reference
from supersonic_moe.perf_model import LayerShape

SHAPE = LayerShape(256, 256, 128, 4, 2)
CONFIG = LayerConfig(torch.device("cpu"), torch.bfloat16, peers=(), warm_ms=0, min_ms=0)
FEW = (Bf16Recipe(), Fp8Recipe(wgrad="bf16"), Fp8Recipe(wgrad="fp8", save_preactivation="recompute"))
PART = "This page is of a run without a result for"


def test_recipes_are_all_combinations_once() -> None:
    fp8 = [recipe for recipe in RECIPES if isinstance(recipe, Fp8Recipe)]
    assert len({recipe_name(recipe) for recipe in RECIPES}) == 18 and len(fp8) == 2 * 4 * 2 + 1
    assert RECIPES[0] == Bf16Recipe() and Fp8Recipe() in fp8


def test_errors_are_those_of_the_oracle() -> None:
    ours, exact = torch.randn(7, 5), torch.randn(7, 5)
    assert precision.error(ours, exact) == pytest.approx({"rrmse": relative(ours, exact), "cos": cosine(ours, exact)})


def test_the_exact_layer_differs_from_bf16_by_rounding_alone() -> None:
    layer = Layer(SHAPE, CONFIG, "gaussian")
    for tensor, ours, exact in zip(TENSORS, layer.fwd_bwd(Bf16Recipe()), layer.exact(), strict=True):
        assert exact.dtype is torch.float32 and 1e-4 < relative(ours, exact) < 6e-3, tensor


def test_inputs_are_what_they_are_called() -> None:
    layers = {kind: Layer(SHAPE, CONFIG, kind).operands for kind in INPUTS}
    assert all((t >= 0).all() for t in layers["positive"][:3]) and (layers["positive"].dout_TH < 0).any()
    of_channel = layers["outliers"].x_TH.float().norm(dim=0)
    assert int((of_channel > 10 * of_channel.median()).sum()) == 256 // 100 + 1
    of_token = layers["uneven"].dout_TH.float().norm(dim=1)
    assert of_token.max() / of_token.min() > 1000 > 2 > layers["gaussian"].dout_TH.float().norm(dim=1).std()


def test_case_has_time_memory_and_errors_within_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "RECIPES", FEW)
    result = run_case(SHAPE, CONFIG)
    assert result.missing == {} and list(result.metrics) == [recipe_name(recipe) for recipe in FEW]
    for name in list(result.metrics)[1:]:
        assert result.errors[name].keys() == {(kind, tensor) for kind in INPUTS for tensor in TENSORS}
        for (kind, tensor), error in result.errors[name].items():
            limit, cosine_limit = (0.15, 0.99) if tensor == "ds" else (LIMITS[tensor], 0.997)  # ds has few elements
            assert error["rrmse"] < limit and error["cos"] > cosine_limit, (name, kind, tensor)
            assert error["rrmse"] > 2 * result.errors["bf16"][kind, tensor]["rrmse"]
    bf16, fp8, again = result.metrics.values()
    assert again["saved_bytes"] < fp8["saved_bytes"] < 0.7 * bf16["saved_bytes"]
    cases = {case.case: case for case in result.cases()}
    assert len(cases) == 2 * (1 + 4 * 5)
    name = f"{SHAPE}_{recipe_name(FEW[1])}"
    assert cases[name].peers == [OURS_BF16] == cases[f"{name}/uneven/dw1"].peers


def test_a_recipe_that_does_not_run_is_missing_and_a_wrong_one_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*args: Any, **kwargs: Any) -> torch.Tensor:
        return 0.5 * product(*args, **kwargs)

    def no_such_product(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("no such product")

    product = reference.grouped_mm_wgrad
    monkeypatch.setattr(precision, "RECIPES", FEW)
    monkeypatch.setattr(precision, "INPUTS", {"gaussian": precision.gaussian})
    monkeypatch.setattr(reference, "grouped_mm_wgrad_fp8", no_such_product)
    result = run_case(LayerShape(32, 128, 128, 2, 1), CONFIG)
    assert (
        list(result.metrics) == [recipe_name(recipe) for recipe in FEW[:2]]
        and "no such product" in result.missing[recipe_name(FEW[2])]
    )

    layer = Layer(SHAPE, CONFIG, "gaussian")
    exact = layer.exact()
    monkeypatch.setattr(reference, "grouped_mm_wgrad", half)
    wrong = dict(zip(TENSORS, map(precision.error, layer.fwd_bwd(FEW[1]), exact), strict=True))
    assert wrong["dw1"]["rrmse"] == pytest.approx(0.5, abs=0.01) and wrong["dw1"]["cos"] > 0.99
    assert wrong["dx"]["rrmse"] < 0.08


def test_command_prints_and_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(precision, "RECIPES", FEW)
    file, page = tmp_path / "precision-fp8.json", tmp_path / "docs" / "fp8.md"
    options = [*QUICK, "--json", str(file), "--markdown", str(page)]
    result = run("bench", "precision", "--shape", "64,128,128,4,2", *options, columns=160)
    assert result.exit_code == 0, result.output
    content = json.loads(file.read_text())
    assert content["suite"] == "precision" and {row["peer"] for row in content["rows"]} == {OURS_BF16}
    metrics = {row["metric"] for row in content["rows"]}
    assert metrics == {"fwd_bwd_us", "fwd_bwd_spread", "saved_bytes", "weight_copy_bytes", "rrmse", "cos"}
    table = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(FEW) and len({line.count("|") for line in table}) == 1
    assert "| fp8 | recompute | fp32 |" in table[-1] and "recompute" in result.output


def test_a_page_of_a_part_of_a_run_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped_at_the_second(case: LayerShape, *args: Any) -> PrecisionResult:
        if case.tokens == 32:
            raise KeyboardInterrupt
        return run_case(case, *args)

    monkeypatch.setattr(precision, "RECIPES", FEW[:1])
    monkeypatch.setattr(precision, "run_case", stopped_at_the_second)
    page, shapes = tmp_path / "fp8.md", ["--shape", "64,128,128,4,2", "--shape", "32,128,128,4,2"]
    result = run("bench", "precision", *shapes, *QUICK, "--markdown", str(page), columns=200)
    first, second = "T64_H128_I128_E4_K2", "T32_H128_I128_E4_K2"
    assert result.exit_code == 130 and f"Written: {page}. Measured: 1 of 2 cases. Missing: {second}." in result.output
    text = page.read_text()
    assert f"**{PART} {second}. " in text and f"## `{first}`" in text
    result = run("bench", "precision", *shapes[:2], *QUICK, "--markdown", str(page))
    assert result.exit_code == 0 and PART not in page.read_text()
    committed = Path(__file__).parents[2] / "docs" / "fp8.md"
    assert PART not in committed.read_text(), "measure all of its cases"
