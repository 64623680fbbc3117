"""The FP8 GEMM suite on a CPU: stand-ins with the signatures of our kernels and of DeepGEMM's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from command_line import QUICK, run
from gemm_stand_ins import our_gradient, our_product

from supersonic_moe.bench import gemm, gemm_fp8, readme
from supersonic_moe.bench.gemm import GemmResult, run_case
from supersonic_moe.bench.gemm_fp8 import BF16, COMPARED
from supersonic_moe.bench.shapes import GEMM_CASES, GemmCase
from supersonic_moe.bench.timing import WallClock
from supersonic_moe.config.recipe import Fp8Recipe
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import Into, Quantized, Rows, UpProjection
from supersonic_moe.kernels.reference.quantize import dequantize
from supersonic_moe.kernels.sm90 import (
    grouped_gemm,
    grouped_gemm_fp8,
    grouped_wgrad,
    grouped_wgrad_fp8,
    up_projection_fp8,
)
from supersonic_moe.quantization.block_format import E4M3

CPU = torch.device("cpu")
PRODUCT, GRADIENT = GemmCase.parse("gemm:3,128,128,256"), GemmCase.parse("wgrad:3,128,40,136")

# ---- the stand-ins ---------------------------------------------------------------------------------------------------


def our_fp8_product(a: Rows[Quantized], b: Quantized, offsets: Tensor) -> Tensor:
    contiguous = 0 if a.gather_index is None else 1  # what map_of_scales demands
    assert a.x.q.dtype is E4M3 and a.x.scale.stride(contiguous) == 1
    return reference.grouped_mm_fp8(a, b, offsets)


def deep_gemm_product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, grouped_layout: Tensor) -> None:
    (a_q, a_scale), (b_q, b_scale) = a, b
    assert a_scale.shape == (a_q.shape[0], a_q.shape[1] // 128) and a_scale.stride(0) == 1
    assert b_q.is_contiguous() and b_scale.is_contiguous() and grouped_layout.dtype is torch.int32
    rows, weights = dequantize(a_q, a_scale, torch.float32), dequantize(b_q, b_scale, torch.float32)
    for row, expert in enumerate(grouped_layout.tolist()):
        d[row] = weights[expert] @ rows[row]


def deep_gemm_gradient(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], d: Tensor, ks: list[int], ks_tensor: Tensor, c: Tensor
) -> None:
    assert c is d and d.dtype is torch.float32 and ks_tensor.tolist() == ks
    first = 0
    for e, k in enumerate(ks):
        parts = []
        for q, scale in (a, b):
            size = scale.shape[0]  # (M or N, blocks), flat q: (M or N, rows) of one expert after the other
            part = q[first * size : (first + k) * size].view(size, k)
            parts.append(dequantize(part, scale[:, first // 128 : (first + k) // 128], torch.float32))
        d[e] += parts[0] @ parts[1].T
        first += k


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, instead in (
        (grouped_gemm, "grouped_mm", our_product),
        (grouped_wgrad, "grouped_mm_wgrad", our_gradient),
        (grouped_gemm_fp8, "grouped_mm_fp8", our_fp8_product),
        (grouped_wgrad_fp8, "grouped_mm_wgrad_fp8", reference.grouped_mm_wgrad_fp8),
        (up_projection_fp8, "up_projection_fp8", reference.up_projection_fp8),
    ):
        monkeypatch.setattr(module, name, create_autospec(getattr(module, name), side_effect=instead))
    monkeypatch.setattr(gemm_fp8, "quantize", reference.quantize)
    monkeypatch.setattr(gemm_fp8, "pad_segments", reference.pad_segments)
    peer: Any = ModuleType("deep_gemm")
    peer.m_grouped_fp8_gemm_nt_contiguous = deep_gemm_product
    peer.k_grouped_fp8_gemm_nt_contiguous = deep_gemm_gradient
    peer.get_mn_major_tma_aligned_tensor = lambda scale: scale.t().contiguous().t()
    monkeypatch.setitem(sys.modules, "deep_gemm", peer)


def quick(case: GemmCase) -> GemmResult:
    return run_case(case, gemm_fp8.contenders, CPU, WallClock(), warm_ms=0, min_ms=0, compared=COMPARED)


# ---- checks before speed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PRODUCT, GRADIENT], ids=str)
@pytest.mark.usefixtures("stand_ins")
def test_everyone_computes_the_product_and_is_timed(case: GemmCase) -> None:
    result = quick(case)
    assert result.missing == {} and result.failed == []
    assert result.metrics.keys() == set(COMPARED[case.kind]) | {BF16, "deep_gemm"}
    adds = {"ours_accumulate", "deep_gemm"} if case.kind == "wgrad" else set()
    for name, metrics in result.metrics.items():
        low, high = (0, 1e-5) if name in adds else (0.02, 0.03) if "up" in name else (1e-3, 2.5e-3)
        assert low <= metrics["rel_fro"] < high, name
    found = {comparison.case.removeprefix(case.name): set(comparison.peers) for comparison in result.cases()}
    assert found == {name.removeprefix("ours"): set(who) for name, who in COMPARED[case.kind].items()}


@pytest.mark.usefixtures("stand_ins")
def test_down_projections_have_no_fused_activation_and_rows_need_no_padding() -> None:
    down = [case.name for case in GEMM_CASES if case.kind == "gemm" and case.name.endswith(gemm_fp8.DOWN)]
    assert down == ["ref_down", "flash_l2", "pro_l2"]
    result = quick(GemmCase("tiny_down", "gemm", 2, 50, (24, 40)))
    assert list(result.metrics) == ["ours", "ours_gathered", BF16] and not result.failed
    assert "must be a multiple of 128; got 50" in result.missing["deep_gemm"]
    padded = quick(GemmCase.parse("wgrad:3,50,24,40"))
    assert padded.failed == [] and set(padded.missing) == {"deep_gemm"}


def ignores_index(a: Rows[Quantized], b: Quantized, offsets: Tensor) -> Tensor:
    return reference.grouped_mm_fp8(Rows(a.x), b, offsets)


def other_experts(step: UpProjection[Quantized], recipe: Fp8Recipe) -> Any:
    return reference.up_projection_fp8(step._replace(w1=step.w1._replace(q=step.w1.q.flip(0))), recipe)


def forgets(option: str) -> Callable[..., Tensor]:
    def product(a: Quantized, b: Quantized, offsets: Tensor, into: Into) -> Tensor:
        return reference.grouped_mm_wgrad_fp8(a, b, offsets, into._replace(**{option: False}))

    return product


@pytest.mark.parametrize(
    ("case", "who", "module", "function", "fault"),
    [
        (PRODUCT, "ours_gathered", grouped_gemm_fp8, "grouped_mm_fp8", ignores_index),
        (PRODUCT, "ours_up", up_projection_fp8, "up_projection_fp8", other_experts),
        (GRADIENT, "ours_transposed", grouped_wgrad_fp8, "grouped_mm_wgrad_fp8", forgets("transposed")),
        (GRADIENT, "ours_accumulate", grouped_wgrad_fp8, "grouped_mm_wgrad_fp8", forgets("accumulate")),
    ],
    ids=["index ignored", "other experts", "not transposed", "overwrites"],
)
@pytest.mark.usefixtures("stand_ins")
def test_a_wrong_result_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, case: GemmCase, who: str, module: ModuleType, function: str, fault: Any
) -> None:
    monkeypatch.setattr(module, function, fault)
    result = quick(case)
    assert who in result.failed and who not in result.metrics
    assert {BF16, "deep_gemm"} <= result.metrics.keys()


@pytest.mark.usefixtures("stand_ins")
def test_a_peer_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    for case in (PRODUCT, GRADIENT):
        assert list(quick(case).missing) == ["deep_gemm"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_ins")
def test_command_prints_and_writes_what_the_readme_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gemm, "check_device", lambda device: None)
    file = tmp_path / "gemm-fp8.json"
    cases = ["--case", "gemm:2,128,128,128", "--case", "wgrad:2,128,16,128"]
    args = ["bench", "gemm", "--precision", "fp8", *cases, *QUICK]
    result = run(*args, "--json", str(file))
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    suffixes = {row["case"].partition("_K128")[2] for row in rows if row["case"].startswith("gemm")}
    assert suffixes == {"", "_gathered", "_up", "_up_gathered"}
    heading = "| case | time, µs | TFLOP/s | relative error | vs deep_gemm | vs ours-BF16 |"
    assert heading in readme.results(tmp_path, tmp_path / "page.md")


@pytest.mark.gpu
def test_command_on_a_gpu(device: torch.device, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    cases = ["--case", "gemm:4,300,512,384", "--case", "wgrad:4,300,512,384"]
    args = ["bench", "gemm", "--precision", "fp8", *cases, "--min-ms", "20", "--warm-ms", "20"]
    result = run(*args)
    assert result.exit_code == 0, result.output
    assert "ours_up_gathered" in result.output and "ours_transposed" in result.output
