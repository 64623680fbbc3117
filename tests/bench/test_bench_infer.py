"""The inference suite without a GPU: its cases, fits, table and file; and every peer's pipeline in Triton's
interpreter, with the products that other libraries would compute replaced by plain torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import deep_gemm_stand_in
import pytest
import torch
from command_line import run, words
from deep_gemm_stand_in import product
from torch import Tensor

pytest.importorskip("triton")

from supersonic_moe.bench import infer, infer_cases, infer_figure, infer_parts, infer_peers, infer_triton
from supersonic_moe.bench.infer_cases import CONTEST, DEEPSEEK_EP8, MODELS, InferCase, InferShape, Workload, workload
from supersonic_moe.bench.report import OURS
from supersonic_moe.config.grouped_routing import GroupedRouting

CPU = torch.device("cpu")
RULE = GroupedRouting(num_experts=64, top_k=8, n_group=8, topk_group=4, scaling_factor=2.5)
SHAPE = InferShape("small", 256, 256, 8, RULE)


def work(tokens: int, routing: str = "uniform", shape: InferShape = SHAPE) -> Workload:
    return workload(InferCase(shape, tokens, 16, routing), infer_cases.random_experts(shape, CPU), CPU)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_the_contest_has_nineteen_sizes_and_ten_models_five() -> None:
    assert len(CONTEST) == 3 * 19 and len({case.tokens for case in CONTEST}) == 19
    assert len(MODELS) == 10 * 5
    assert len({str(case) for case in (*CONTEST, *MODELS)}) == len(CONTEST) + len(MODELS)
    assert all(case.offset % 32 == 0 and case.offset < 256 for case in CONTEST)
    assert DEEPSEEK_EP8.expert_bytes == 44_040_192 + 10_752


def test_a_floor_is_memory_for_few_rows_and_products_for_many() -> None:
    moved, us = DEEPSEEK_EP8.floor(1, 1, 1)
    assert moved == 44_050_944 + 7168 * 3 + 4 * 56 + 1024 and us == pytest.approx(moved / 4.26e6)
    assert DEEPSEEK_EP8.floor(14107, 32, 16158)[1] == pytest.approx(16158 * 88.08e6 / 1284e6, rel=1e-3)


def test_routings_go_where_they_say() -> None:
    hot = work(19, "hot")
    assert hot.counts[4] == 19
    skewed = InferCase(InferShape("ds", 128, 64, 32, DEEPSEEK_EP8.rule), 901, 96, "skewed")
    made = workload(skewed, infer_cases.random_experts(skewed.shape, CPU), CPU)
    assert made.rows / 901 == pytest.approx(1340 / 901, rel=0.15)
    assert made.rows == int((made.local_ids() >= 0).sum())


def test_a_case_by_name_and_others_refused() -> None:
    assert infer_cases.parse("ds_T80_skewed").offset == 96
    for option, said in (("--case", "a case is named like"), ("--set", "a set is one of"), ("--peers", "peers are")):
        result = run("bench", "infer", "--device", "cpu", option, "nonsense")
        assert result.exit_code == 2 and said in words(result)


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "HOST_CALLS", 1)
    monkeypatch.setattr(infer, "EAGER_CALLS", 1)


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_a_run_on_a_cpu_writes_its_file_and_its_figure(few_calls: None, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("infer.json", "infer.png")]
    result = run("bench", "infer", "--device", "cpu", "--min-ms", "0", "--warm-ms", "0", "--commit", "c",
                 "--json", files[0], "--png", files[1])  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(Path(files[0]).read_text())["rows"]
    metrics = {row["metric"]: row["value"] for row in rows if row["case"] == "tiny_T19_hot"}
    assert {"hits", "rows", "replay_us", "eager_us", "host_us", "floor_us", "of_floor", "gbps", "rel_fro"} <= set(
        metrics
    )
    assert metrics["gbps"] == pytest.approx(metrics["bytes"] / metrics["replay_us"] / 1e3, rel=1e-4)
    assert 0.01 < metrics["rel_fro"] < infer.LIMIT and metrics["matched"] > 0.9
    assert Path(files[1]).stat().st_size > 10_000


def test_a_wrong_peer_is_missing_and_a_wrong_operator_no_result(
    few_calls: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = infer.Runner(CPU, warm_ms=0, min_ms=0, peers=["good", "wrong", "absent"])

    def absent(work: Workload) -> infer_parts.Call:
        raise ModuleNotFoundError("No module named 'absent'")

    def wrong(work: Workload) -> infer_parts.Call:
        call = infer_parts.ours(work)
        return lambda: call() * 1.1

    contenders = {OURS: infer_parts.ours, "good": infer_parts.ours, "wrong": wrong, "absent": absent}
    monkeypatch.setattr(runner, "_contenders", lambda: contenders)
    result = runner.run(InferCase(SHAPE, 9, 16), lambda _: None)
    assert list(result.metrics) == [OURS, "good"] and set(result.missing) == {"wrong", "absent"}
    assert "over the limit of 0.04" in result.missing["wrong"]
    assert infer.best_peer(result) == ("good", result.metrics["good"]["replay_us"])
    contenders[OURS] = wrong
    with pytest.raises(infer.NoResultError, match=r"over the limit of 0\.03"):
        runner.run(InferCase(SHAPE, 9, 16), lambda _: None)


def test_the_contest_measure_forgives_small_and_near() -> None:
    expected = torch.tensor([0.0, 10.0, 10.0, 1000.0, 1000.0])
    got = torch.tensor([0.9, 12.9, 13.5, 1299.0, 1301.0])
    assert infer.matched(got, expected) == pytest.approx(3 / 5)


def test_fits_find_a_fixed_time_and_a_slope() -> None:
    results = []
    for tokens, hits in ((1, 1), (7, 6), (32, 19), (901, 32)):
        case = InferCase(DEEPSEEK_EP8, tokens, 32)
        metrics = {OURS: {"replay_us": 12.0 + 10.5 * hits}, "peer": {"replay_us": 30.0 + 11 * hits}}
        results.append(infer.InferResult(str(case), metrics, hits=hits, rows=tokens, of=case))
    results[-1].metrics[OURS]["replay_us"] = 1e6  # T 901 takes no part
    (fit,) = infer.fits(results)
    assert fit.case == "ds_fit_uniform"
    assert fit.metrics[OURS] == pytest.approx({"fixed_us": 12.0, "hit_us": 10.5})
    assert fit.metrics["peer"] == pytest.approx({"fixed_us": 30.0, "hit_us": 11.0})


def test_the_figure_has_a_panel_for_each_routing_and_the_floor() -> None:
    results = []
    for routing in ("uniform", "hot"):
        for tokens in (7, 80):
            case = InferCase(DEEPSEEK_EP8, tokens, 32, routing)
            metrics = {OURS: {"replay_us": 90.0 + tokens, "floor_us": 60.0 + tokens}, "peer": {"replay_us": 200.0}}
            results.append(infer.InferResult(str(case), metrics, of=case))
    figure = infer_figure.draw(results, "title")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["ds, uniform", "ds, hot"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [OURS, "peer", "floor"]
    ours = next(line for line in figure.axes[0].lines if list(line.get_ydata()) == [97.0, 170.0])
    assert list(ours.get_xdata()) == [67.0, 140.0]


# ---- peers -----------------------------------------------------------------------------------------------------------


def masked(a: Any, b: Any, out: Tensor, counts: Tensor, expected: int) -> None:
    assert a[1].stride(1) == 1 and a[1].stride(2) % 4 == 0, "scales must lie as TMA wants them"
    for e, count in enumerate(counts.tolist()):
        out[e] = torch.nan
        out[e, :count] = product(a[0][e, :count], a[1][e, :count], b[0][e], b[1][e])


def contiguous(a: Any, b: Any, out: Tensor, expert_P: Tensor) -> None:
    assert out.shape[0] % 128 == 0 and a[1].stride(0) == 1
    for start in range(0, out.shape[0], 128):
        (e,) = set(expert_P[start : start + 128].tolist())
        rows = slice(start, start + 128)
        out[rows] = product(a[0][rows], a[1][rows], b[0][e], b[1][e])


def cutlass(out: Tensor, *arguments: Tensor) -> None:
    """The two forms differ in the tensors that they keep pointers and layouts in."""
    if len(arguments) > 10:
        assert len(arguments) == 17
        arguments = (*arguments[5:12], *arguments[14:])
    a, b, a_scale, b_scale, stride_a, stride_b, stride_out, sizes, offsets, _ = arguments
    for e, ((rows, n, k), start) in enumerate(zip(sizes.tolist(), offsets.tolist(), strict=True)):
        assert (n, k) == (out.shape[1], a.shape[1]) == (int(stride_out[e]), int(stride_a[e])) and stride_b[e] == k
        at = slice(start, start + rows)
        out[at] = product(a[at], a_scale[at], b[e].T, b_scale[e].T)


def invoke(
    a: Tensor, b: Tensor, bias: None, out: Tensor, a_scale: Tensor, b_scale: Tensor, zero: None, weights: Tensor,
    ids: Tensor, slots: Tensor, experts: Tensor, end: Tensor, weigh: bool, each: int, config: dict[str, int], **_: Any,
) -> None:  # fmt: skip
    tile = config["BLOCK_SIZE_M"]
    for row in range(int(end)):
        slot, e = int(slots[row]), int(experts[row // tile])
        if slot < ids.numel():
            at = slice(slot // each, slot // each + 1)
            y = product(a.view(torch.uint8)[at].view(a.dtype), a_scale[at], b[e], b_scale[e])
            out[slot] = (y * weights.flatten()[slot] if weigh else y)[0]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """deep_gemm, sgl_kernel and SGLang's file of Triton kernels, as plain torch."""
    deep_gemm, sgl_kernel = deep_gemm_stand_in.module(), ModuleType("sgl_kernel")
    vars(deep_gemm).update(m_grouped_fp8_fp4_gemm_nt_masked=masked, m_grouped_fp8_fp4_gemm_nt_contiguous=contiguous)
    vars(sgl_kernel).update(fp8_blockwise_scaled_grouped_mm=cutlass, es_fp8_blockwise_scaled_grouped_mm=cutlass)
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm)
    monkeypatch.setitem(sys.modules, "sgl_kernel", sgl_kernel)
    kernels = SimpleNamespace(invoke_fused_moe_kernel=invoke, tl=SimpleNamespace(bfloat16=None))
    monkeypatch.setattr(infer_triton, "fused_moe_kernels", lambda: kernels)
    monkeypatch.setattr(infer_peers, "_group", lambda: None)
    monkeypatch.setattr(infer_peers, "MASKED_TOKENS", 16)  # 17 tokens are contiguous rows
    monkeypatch.setattr(infer_triton, "_products_us", lambda work, config, clock: float(config.block_m))


@pytest.mark.parametrize(("tokens", "routing"), [(1, "uniform"), (9, "uniform"), (17, "hot")])
@pytest.mark.parametrize("peer", infer_peers.PEERS)
def test_every_peer_computes_the_operator(libraries: None, peer: str, tokens: int, routing: str) -> None:
    made = work(tokens, routing)
    expected, checked = infer.reference(made, requantize=False)
    got = infer_peers.PEERS[peer](made)()[checked].float()
    assert float((got - expected).norm() / expected.norm()) <= infer.PEER_LIMIT
    nowhere = (made.local_ids() < 0).all(1)
    assert not got[nowhere].any()


def test_a_peer_that_wants_whole_blocks_says_so(libraries: None) -> None:
    made = work(3, shape=InferShape("narrow", 256, 192, 8, RULE))
    for build in infer_peers.PEERS.values():
        with pytest.raises(ValueError, match="I in multiples of 128; got 192"):
            build(made)


def test_the_sweep_has_24_configurations_of_each_kind() -> None:
    for rows in (1, 500):
        configs = infer_triton.sweep(rows)
        assert len(set(configs)) == 24
    assert {config.block_m for config in infer_triton.sweep(500)} == {32, 64, 128}
