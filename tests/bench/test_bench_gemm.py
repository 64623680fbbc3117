"""The GEMM suite on a CPU: our kernels and DeepGEMM stand in by functions that refuse any call the real ones would."""

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
from command_line import QUICK, run, words
from gemm_stand_ins import our_gradient, our_product
from torch import Tensor
from typer.testing import Result

from supersonic_moe.bench import gemm, gemm_bf16, readme, report
from supersonic_moe.bench.gemm import COMPARED, Contender, GemmResult, check_device, run_case
from supersonic_moe.bench.shapes import GEMM_CASES, GemmCase
from supersonic_moe.bench.timing import NoResultError, WallClock
from supersonic_moe.kernels.interface import NEW, Into, Rows
from supersonic_moe.kernels.sm90 import grouped_gemm, grouped_wgrad

CPU = torch.device("cpu")
PRODUCT = GemmCase.parse("gemm:3,128,40,24")
GRADIENT = GemmCase.parse("wgrad:3,128,40,24")


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_named_cases_and_cases_of_the_users_own() -> None:
    assert [case.kind for case in GEMM_CASES] == ["gemm"] * 7 + ["wgrad"] * 5
    assert len({case.name for case in GEMM_CASES}) == 12
    assert all(GemmCase.parse(f" {case.name}") is case for case in GEMM_CASES)
    assert GemmCase.parse("pro_l1").flops == 2 * 48 * 1024 * 6144 * 7168
    assert (GRADIENT.name, GRADIENT.rows, GRADIENT.sizes) == ("wgrad_E3_R128_M40_N24", 384, (40, 24))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ref_upp", "a case is one of ref_up, .*got 'ref_upp'"),
        ("8,8,8,8", "gemm:E,rows,N,K or wgrad:E,rows,M,N"),
        ("gemm:8,8,8", "whole numbers"),
        ("gemm:0,8,8,8", "at least one expert .*gemm_E0_R8_N8_K8"),
        ("wgrad:1,0,8,8", "at least .*one row"),
        ("wgrad:1,8,12,8", "multiples of 8.*wgrad_E1_R8_M12_N8"),
        ("gemm:1,8,8,0", "multiples of 8"),
    ],
)
def test_bad_cases_are_one_sentence(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        GemmCase.parse(text)


# ---- the stand-ins ---------------------------------------------------------------------------------------------------


def bf16(*tensors: Tensor) -> bool:
    return all(t.dtype is torch.bfloat16 and t.is_contiguous() for t in tensors)


def deep_gemm_product(a: Tensor, b: Tensor, d: Tensor, grouped_layout: Tensor, compiled_dims: str = "nk") -> None:
    assert bf16(a, b, d) and grouped_layout.dtype is torch.int32
    assert d.shape == (a.shape[0], b.shape[1]) and grouped_layout.shape == a.shape[:1]
    for row, expert in enumerate(grouped_layout.tolist()):
        d[row] = b[expert].float() @ a[row].float()


def deep_gemm_gradient(
    a: Tensor,
    b: Tensor,
    d: Tensor,
    ks: list[int],
    ks_tensor: Tensor,
    c: Tensor | None = None,
    compiled_dims: str = "mn",
) -> None:
    assert bf16(a, b) and sum(ks) == a.shape[0] == b.shape[0] and ks_tensor.tolist() == ks
    assert c is d and d.dtype is torch.float32 and d.shape == (len(ks), a.shape[1], b.shape[1])
    for e, (a_e, b_e) in enumerate(zip(a.split(ks), b.split(ks), strict=True)):
        d[e] += a_e.float().T @ b_e.float()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the signatures of our kernels, enforced."""
    for module, name, instead in (
        (grouped_gemm, "grouped_mm", our_product),
        (grouped_wgrad, "grouped_mm_wgrad", our_gradient),
    ):
        monkeypatch.setattr(module, name, create_autospec(getattr(module, name), side_effect=instead))
    peer: Any = ModuleType("deep_gemm")
    peer.m_grouped_bf16_gemm_nt_contiguous = deep_gemm_product
    peer.k_grouped_bf16_gemm_tn_contiguous = deep_gemm_gradient
    monkeypatch.setitem(sys.modules, "deep_gemm", peer)


def quick(case: GemmCase) -> GemmResult:
    return run_case(case, gemm_bf16.contenders, CPU, WallClock(), warm_ms=0, min_ms=0)


# ---- checks before speed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PRODUCT, GRADIENT], ids=str)
@pytest.mark.usefixtures("stand_ins")
def test_everyone_computes_the_product_and_is_timed(case: GemmCase) -> None:
    result = quick(case)
    assert result.missing == {} and result.failed == []
    assert result.metrics.keys() == set(COMPARED[case.kind]) | {"torch_grouped_mm", "deep_gemm"}
    assert next(iter(result.metrics)) == "ours"
    for name, metrics in result.metrics.items():
        assert metrics["us"] > 0 and metrics["tflops"] == pytest.approx(case.flops / metrics["us"] / 1e6)
        adds = case.kind == "wgrad" and name in ("ours_accumulate", "deep_gemm")
        assert metrics["rel_fro"] < 1e-6 if adds else 1e-3 < metrics["rel_fro"] < 2.5e-3, name


def last_expert_is_nan(got: Tensor) -> Tensor:
    got[-1] = torch.nan
    return got


def overwrites(a: Rows[Tensor], b_PN: Tensor, offsets: Tensor, into: Into = NEW) -> Tensor:
    if into.out is not None:
        into.out.zero_()
    return our_gradient(a, b_PN, offsets, into)


@pytest.mark.parametrize(
    ("case", "who", "fault"),
    [
        (PRODUCT, "ours_gathered", lambda a, *args: our_product(Rows(a.x), *args)),
        (PRODUCT, "ours", lambda *args, **how: last_expert_is_nan(our_product(*args, **how))),
        (GRADIENT, "ours_gathered", lambda a, *args, **how: our_gradient(Rows(a.x), *args, **how)),
        (GRADIENT, "ours", lambda *args, **how: last_expert_is_nan(our_gradient(*args, **how))),
        (GRADIENT, "ours_accumulate", overwrites),
    ],
    ids=["index ignored", "last row", "index ignored in wgrad", "last expert", "overwrites"],
)  # fmt: skip
@pytest.mark.usefixtures("stand_ins")
def test_a_wrong_result_has_no_speed(
    monkeypatch: pytest.MonkeyPatch, case: GemmCase, who: str, fault: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(grouped_gemm, "grouped_mm", fault)
    monkeypatch.setattr(grouped_wgrad, "grouped_mm_wgrad", fault)
    result = quick(case)
    assert "wrong result: its relative Frobenius error is" in result.missing[who]
    assert who in result.failed and who not in result.metrics
    assert {"torch_grouped_mm", "deep_gemm"} <= result.metrics.keys()
    names = [comparison.case for comparison in result.cases()]
    assert names == [case.name + name.removeprefix("ours") for name in COMPARED[case.kind] if name in result.metrics]


@pytest.mark.usefixtures("stand_ins")
def test_a_peer_that_is_absent_or_cannot_is_missing_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    unaligned = quick(GemmCase.parse("gemm:2,100,16,16"))
    assert "must be a multiple of 128; got 100" in unaligned.missing["deep_gemm"] and not unaligned.failed
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    for case in (PRODUCT, GRADIENT):
        result = quick(case)
        assert list(result.missing) == ["deep_gemm"] and "deep_gemm" in result.missing["deep_gemm"]
        rows = [row for comparison in result.cases() for row in report.rows(comparison) if row.metric == "us"]
        assert {row.peer_value for row in rows if row.peer == "deep_gemm"} == {None}


def test_operands_that_do_not_fit_end_the_case() -> None:
    def too_large(_case: GemmCase, _device: torch.device) -> dict[str, Callable[[], Contender]]:
        raise torch.OutOfMemoryError("tried to allocate 9 TiB. And so on.")

    with pytest.raises(NoResultError, match=r"^gemm_E3_R128_N40_K24: out of memory: tried to allocate 9 TiB\.$"):
        run_case(PRODUCT, too_large, CPU, WallClock(), warm_ms=0, min_ms=0)


# ---- what is compared ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "milliseconds", "ratios"),
    [
        (
            PRODUCT,
            dict(ours=2, ours_gathered=2.5, torch_grouped_mm=3, deep_gemm=1),
            {("", "deep_gemm"): 0.5, ("", "torch_grouped_mm"): 1.5, ("_gathered", "ours"): 0.8},
        ),
        (
            GRADIENT,
            dict(ours=2, ours_gathered=4, ours_accumulate=5, torch_grouped_mm=3, deep_gemm=6),
            {
                ("", "torch_grouped_mm"): 1.5,
                ("_gathered", "ours"): 0.5,
                ("_gathered", "torch_grouped_mm"): 0.75,
                ("_accumulate", "deep_gemm"): 1.2,
            },
        ),
    ],
    ids=["gemm", "wgrad"],
)
def test_contenders_meet_those_that_do_the_same_work(
    case: GemmCase, milliseconds: dict[str, float], ratios: dict[tuple[str, str], float]
) -> None:
    """Another operand format, whose contenders take a known time on a clock of their own."""
    now = 0.0

    def contender(ms: float) -> Contender:
        def run() -> Tensor:
            nonlocal now
            now += ms / 1e3
            return torch.full((3, 2, 4), 3.0)

        return Contender(run, lambda expert: torch.full((2, 4), 2.0, dtype=torch.float64), initial=1)

    def operands(_case: GemmCase, _device: torch.device) -> dict[str, Callable[[], Contender]]:
        return {name: lambda ms=ms: contender(ms) for name, ms in milliseconds.items()}  # type: ignore[misc]

    result = run_case(case, operands, CPU, WallClock(lambda: now), warm_ms=10, min_ms=20)
    rows = [row for comparison in result.cases() for row in report.rows(comparison)]
    assert {(r.case.removeprefix(case.name), r.peer): r.ratio for r in rows if r.metric == "us"} == ratios
    assert {(r.case.removeprefix(case.name), r.peer): r.ratio for r in rows if r.metric == "tflops"} == ratios
    assert {r.ratio for r in rows if r.metric == "rel_fro"} == {None}
    assert result.metrics["ours"]["us"] == pytest.approx(2000)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*args: str) -> Result:
    return run("bench", "gemm", *args, columns=100)


def test_the_suite_asks_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    result = command("--device", "cpu")
    assert result.exit_code == 2
    assert "needs a GPU of compute capability 9.0" in words(result)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"got cuda:1, a GPU of compute capability 8\.0"):
        check_device(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_device(torch.device("cuda", 1))


@pytest.mark.usefixtures("stand_ins")
def test_command_prints_and_writes_what_the_readme_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gemm, "check_device", lambda device: None)
    cases = ["gemm:2,128,16,32", "gemm:3,128,16,16", "wgrad:2,128,16,24", "wgrad:3,128,8,8"]
    file, chart = tmp_path / "results" / "gemm-test.json", tmp_path / "gemm.png"
    options = ["--device", "cpu", "--min-ms", "1", "--warm-ms", "0", "--json", str(file), "--png", str(chart)]
    result = command(*(word for case in cases for word in ("--case", case)), *options)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    for word in ("ours_gathered", "ours_accumulate", "torch_grouped_mm", "deep_gemm", "geometric mean"):
        assert word in result.output
    content = json.loads(file.read_text())
    assert content["suite"] == "gemm"
    assert {row["metric"] for row in content["rows"]} == {"us", "tflops", "spread", "rel_fro"}
    assert len({row["case"] for row in content["rows"]}) == 2 * 2 + 2 * 3
    assert all(row["value"] > 0 for row in content["rows"] if row["metric"] in ("us", "tflops"))
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 10_000

    table = readme.results(file.parent, tmp_path / "page.md")
    headings = [line for line in table.splitlines() if line.startswith("| case ")]
    assert [heading.partition("vs ")[2] for heading in headings] == [
        "deep_gemm | vs torch_grouped_mm |", "ours |", "torch_grouped_mm |", "ours | vs torch_grouped_mm |",
        "deep_gemm |",
    ]  # fmt: skip
    assert table.count("| geometric mean |") == 5


@pytest.mark.usefixtures("stand_ins")
def test_command_fails_if_a_variant_of_ours_does_and_keeps_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gemm, "check_device", lambda device: None)

    def without_index(a: Rows[Tensor], b_EKN: Tensor, offsets: Tensor) -> Tensor:
        if a.gather_index is not None:
            raise TypeError("no rows through an index")
        return our_product(a, b_EKN, offsets)

    monkeypatch.setattr(grouped_gemm, "grouped_mm", without_index)
    file = tmp_path / "gemm.json"
    result = command(*QUICK, "--case", "gemm:2,128,16,16", "--json", str(file))
    assert result.exit_code == 1
    assert "failed ours_gathered: TypeError" in result.output
    assert {row["case"] for row in json.loads(file.read_text())["rows"]} == {"gemm_E2_R128_N16_K16"}


@pytest.mark.gpu
def test_command_on_a_gpu(device: torch.device, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    file = tmp_path / "gemm.json"
    cases = ["--case", "gemm:4,300,512,264", "--case", "wgrad:4,300,512,264"]
    result = command(*cases, "--min-ms", "20", "--warm-ms", "20", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "missing torch_grouped_mm" not in result.output
    rows = json.loads(file.read_text())["rows"]
    suffixes = {row["case"].partition("_K264")[2] for row in rows if row["case"].startswith("gemm")}
    assert suffixes == {"", "_gathered"}
    suffixes = {row["case"].partition("_N264")[2] for row in rows if row["case"].startswith("wgrad")}
    assert suffixes == {"", "_gathered", "_accumulate"}
