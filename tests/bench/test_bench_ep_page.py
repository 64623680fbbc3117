"""What docs/expert-parallel.md says of training over ranks, from results files made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import results_files

from supersonic_moe.bench import ep_page, ep_parts, readme
from supersonic_moe.bench.ep_contenders import BY_HAND, ONE_GPU
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.shapes import LAYER_SHAPES
from supersonic_moe.bench.timing import Paired

A, B = (str(shape) for shape in LAYER_SHAPES[:2])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


def write(root: Path, name: str, *results: CaseResult) -> None:
    results_files.write(root / readme.RESULTS / f"{name}.json", "ep", results)


def text(root: Path, block: str) -> str:
    return next(page for page in readme.PAGES if page.block == block).text(root)


def step(case: str, us: float, plain_us: float, host_us: float = 100.0, plain_host_us: float = 100.0) -> CaseResult:
    ours = {"fwd_bwd_us": us, "host_us": host_us}
    return CaseResult(case, {OURS: ours, ONE_GPU: {"fwd_bwd_us": plain_us, "host_us": plain_host_us}})


def parts(n: int, us: float) -> CaseResult:
    return CaseResult(f"{A}_{n}-parts", {OURS: {"products_us": us}, ep_parts.ONE_LAUNCH: {"products_us": 100.0}})


def test_one_rank_stands_beside_its_goals(root: Path) -> None:
    assert text(root, "one-rank").startswith("One rank was not measured")
    write(root, "ep-world1-bf16", step(f"{A}_R1", 1005, 1000), step(f"{B}_R1", 1020, 1000, 170, 100))
    write(root, "ep-world1-fp8", step(f"{A}_R1_fp8", 990, 1000, 90, 100), parts(2, 102), parts(4, 105))
    lines = text(root, "one-rank").splitlines()
    assert f"| `{A}` | 1.005 | +0 | 0.990 | -10 | 1.020 | 1.050 |" in lines
    assert f"| `{B}` | 1.020 | +70 | – | – | – | – |" in lines
    goals = [line for line in lines if line.startswith("- ")]
    assert goals == [
        f"- BF16, at most 1.01 of the plain layer's time, in 1 of 2 cases, not at `{B}` (1.020)",
        f"- BF16, at most 60 µs more of the host, in 1 of 2 cases, not at `{B}` (+70)",
        "- FP8, at most 1.01 of the plain layer's time, in 1 of 1 cases",
        "- FP8, at most 60 µs more of the host, in 1 of 1 cases",
        "- products in 2 parts, at most 1.02 of one launch, in 1 of 1 cases",
        f"- products in 4 parts, at most 1.04 of one launch, in 0 of 1 cases, not at `{A}` (1.050)",
    ]


def test_ranks_stand_beside_the_model_that_was_made_before(root: Path) -> None:
    model = text(root, "ranks")
    assert "GPUs" not in model and "takes" not in model
    qwen = "T8192_H2048_I768_E64_K8_R2_gather"  # of 128 experts a rank of two has half
    write(root, "ep-2gpu-bf16", step(f"{A}_R2_gather", 9200, 9000, 300, 100), step(qwen, 3700, 3600, 200, 100))
    write(root, "ep-2gpu-fp8", step(f"{A}_R2_fp8_gather_fp8-wire", 6500, 5000))
    write(root, "ep-4gpu-fp8", step(f"{A}_R4_fp8_gather_fp8-wire", 6400, 5700))
    lines = text(root, "ranks").splitlines()
    reference = "reference: H 3072 I 1536, 8 experts a rank, K 8"
    bf16 = "9,760 / 9,220 | 9,200 (1.022) | 10,940 / 9,430 | – | 12,230 / 9,620 | –"
    fp8 = "6,300 / 5,900 | 6,500 (1.300) | 7,200 / 6,090 | 6,400 (1.123) | 8,200 / 6,270 | –"
    assert f"| {reference} | BF16 | 8,977 | {bf16} |" in lines
    assert f"| {reference} | FP8 | 5,670 | {fp8} |" in lines
    flash = next(line for line in lines if "Flash" in line and "BF16" in line)
    assert flash.count("–") == 3 and "12,600 | 13,610 / 12,880 | –" in flash
    assert "| 3,700 (1.028) |" in next(line for line in lines if "Qwen3" in line and "BF16" in line)
    assert [line.partition(" takes ")[2] for line in lines if line.startswith("- ")] == [
        "1.02, where the model has 1.03 to 1.09: confirmed, less than with ranges",
        "1.30, where the model has 1.04 to 1.11: refuted, longer than without any overlap",
        "1.12, where the model has 1.07 to 1.27: confirmed",
        "1.03, where the model has 1.06 to 1.15: confirmed, less than with ranges",
    ]
    (whole,) = [line for line in lines if line.startswith("**BF16 over 2 GPUs**")]
    assert "A step takes 1.02 to 1.03 times as long" in whole and "at most 1.08, in 2 of 2 cases." in whole
    assert whole.endswith("The host needs 0.2 to 0.3 ms for a step, 0.1 to 0.2 ms beyond the plain layer.")
    (one,) = [line for line in lines if line.startswith("**FP8 over 4 GPUs**")]
    assert "A step takes 1.12 times as long" in one and f"in 0 of 1 cases, not at `{A}` (1.123)" in one


def test_other_routing_and_a_layer_by_hand_are_told_apart(root: Path) -> None:
    """The ratio is that of pairs where there were any, and the model is of tokens that choose evenly."""
    far, even = step(f"{A}_R2_gather_remote0.875", 9900, 9000), step(f"{A}_R2_gather", 9000, 9000)
    even.pairs["fwd_bwd_us", ONE_GPU] = Paired(0.95, 0.94, 0.96)
    even.metrics[BY_HAND] = {"fwd_bwd_us": 18000.0}
    write(root, "ep-2gpu-bf16", far, even)
    lines = text(root, "ranks").splitlines()
    assert "| 9,000 (1.053) |" in next(line for line in lines if "reference" in line and "BF16" in line)
    (said,) = [line for line in lines if line.startswith("**BF16 over 2 GPUs**")]
    assert "With a share of 0.875 of the choices elsewhere a step takes 1.10 times" in said
    assert "A step takes 1.05 times" in said and "in 0 of 1 cases" in said and "in 1 of 1 cases." in said
    assert "The BF16 layer written by hand takes 2.00 times as long as ours." in said


def test_shapes_of_the_model_are_those_that_a_benchmark_may_be_asked_for() -> None:
    assert [model.case(2) for model in ep_page.MODEL[::2]] == [
        "T8192_H3072_I1536_E8_K8_R2", "T8192_H4096_I2048_E32_K6_R2", "T8192_H2048_I768_E64_K8_R2"
    ]  # fmt: skip
    assert ep_page.files()[:4] == ["ep-world1-bf16", "ep-world1-fp8", "ep-2gpu-bf16", "ep-2gpu-fp8"]
