"""Benchmarks: the roofline's arithmetic, timing with a clock that moves when told, peers, memory, files."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from supersonic_moe.bench import layer, report, timing
from supersonic_moe.bench.layer import LayerConfig, run_case
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.shapes import LAYER_SETS
from supersonic_moe.bench.timing import Missing, NoResultError, Paired, Slice, Timing, WallClock, measure
from supersonic_moe.perf_model import H200, LayerShape, layer_flops, layer_steps, saved_activation_bytes

CPU = torch.device("cpu")
REFERENCE = LayerShape(8192, 3072, 1536, 8, 8)
SMALL = LayerShape(96, 32, 16, 4, 2)

# ---- roofline ------------------------------------------------------------------------------------------------------


def test_shape_text_round_trip() -> None:
    assert LayerShape.parse("8192, 3072,1536,8,8") == REFERENCE
    assert LayerShape.parse(str(REFERENCE)) == REFERENCE
    assert str(REFERENCE) == "T8192_H3072_I1536_E8_K8"


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5,6", "8,8,8,4,five", "8,8,8,4,-1", "8,8,8,4,5", "8,0,8,4,2"])
def test_bad_shapes_are_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"got|at least"):
        LayerShape.parse(text)


@given(st.integers(0, 999), st.integers(1, 99), st.integers(1, 99), st.integers(1, 9), st.booleans(), st.data())
@settings(max_examples=60)
def test_steps_add_up_to_the_model_flops(t: int, h: int, i: int, e: int, gated: bool, data: st.DataObject) -> None:
    shape = LayerShape(t, h, i, e, data.draw(st.integers(1, e)))
    steps = [s for s in layer_steps(shape, gated=gated) if s.key.isdigit()]
    assert [s.key for s in steps] == list("12345678")
    forward, both = layer_flops(shape, gated=gated)
    assert sum(s.flops for s in steps if s.phase == "forward") == forward
    assert sum(s.flops for s in steps) == both


def test_reference_shape_by_hand() -> None:
    assert layer_flops(REFERENCE, gated=True)[1] == 18 * 8192 * 8 * 3072 * 1536
    assert saved_activation_bytes(REFERENCE, gated=True) == 2 * 8192 * 3072 + 4 * 65536 * 1536  # 432 MiB
    up, combine = (next(s for s in layer_steps(REFERENCE, gated=True) if s.key == key) for key in "13")
    # X 8192x3072, W1 8x3072x3072, pre-activation 65536x3072, A 65536x1536 in bf16; one int32 per row
    assert up.bytes == 2 * (8192 * 3072 + 8 * 3072 * 3072 + 65536 * 3072 + 65536 * 1536) + 4 * 65536
    assert up.bound(H200) == "compute" and up.roofline_us(H200) == pytest.approx(1819, abs=1)
    assert combine.bound(H200) == "memory" and combine.roofline_us(H200) == pytest.approx(106.5, abs=0.1)


# ---- timing --------------------------------------------------------------------------------------------------------


class Contenders:
    """Calls that take a given time on a clock of their own and write down who ran."""

    def __init__(self, **seconds: float) -> None:
        self.now, self.log = 0.0, ""
        self.calls = {name: lambda name=name, s=s: self._run(name, s) for name, s in seconds.items()}
        self.clock = WallClock(lambda: self.now)

    def _run(self, name: str, seconds: float) -> None:
        self.now += seconds
        self.log += name


def test_medians_warm_up_and_interleaving() -> None:
    it = Contenders(a=0.010, b=0.002)
    results = measure(it.calls, it.clock, warm_ms=300, min_ms=400)
    a, b = results["a"], results["b"]
    assert isinstance(a, Timing) and isinstance(b, Timing)
    assert a.us == pytest.approx(10_000) and b.us == pytest.approx(2_000) and a.spread == pytest.approx(0, abs=1e-9)
    assert a.calls * a.us >= 400e3 * (1 - 1e-9) and b.calls * b.us >= 400e3 * (1 - 1e-9)
    # a probe of two calls each, 150 ms of warm-up each, then four rounds of 150 ms untimed + 100 ms, in turns
    assert it.log[4:].startswith("a" * 15 + "b" * 75)
    timed = it.log[4 + 15 + 75 :]
    a_slice, b_slice = "a" * 25, "b" * 125
    assert timed == a_slice + b_slice + b_slice + a_slice + b_slice + a_slice + a_slice + b_slice


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcdef"])
def test_everyone_runs_behind_neighbours_on_either_side(names: str) -> None:
    """In as many rounds forwards as backwards, and is the first as often as the others."""
    rounds = ["".join(timing.in_turns(names, n)) for n in range(2 * len(names))]
    assert all(sorted(order) == list(names) for order in rounds)
    assert sorted(order[0] for order in rounds) == sorted(2 * names)
    behind = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert all(behind[one, other] == behind[other, one] for one, other in behind)


def test_host_time_is_the_median_of_calls_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = 0.0, ""

    def call(name: str, seconds: float) -> None:
        nonlocal now, log
        now, log = now + seconds * (10 if len(log) == 4 else 1), log + name  # one that the machine held up

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    calls = {"a": lambda: call("a", 1e-3), "b": lambda: call("b", 3e-3)}
    assert timing.host_us(calls, torch.device("cpu"), 4) == pytest.approx({"a": 1000, "b": 3000})
    assert log == "abbabaab"


def test_who_is_far_slower_gets_the_call_of_the_probe() -> None:
    """The others' log is as it would be without it."""
    near = Contenders(a=0.010, b=0.090)
    measure(near.calls, near.clock, warm_ms=300, min_ms=400, beside="a")
    it = Contenders(a=0.010, s=0.500, b=0.090)
    results = measure(it.calls, it.clock, warm_ms=300, min_ms=400, beside="a")
    assert it.log == "aassbb" + near.log[4:] and list(results) == ["a", "s", "b"]
    slow = results["s"]
    assert isinstance(slow, Timing) and slow.few and slow.calls == 1 and slow.us == pytest.approx(500_000)
    assert timing.paired(slow, results["a"]) is None  # type: ignore[arg-type]
    assert timing.paired(results["a"], slow) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "beside"), [(0.5, None), (0.5, "s"), (0.019, "a")])
def test_nobody_else_gets_few_calls(seconds: float, beside: str | None) -> None:
    """Without one to compare with, that one itself, and calls that cost a run nothing."""
    it = Contenders(a=0.001, s=seconds)
    results = measure(it.calls, it.clock, warm_ms=0, min_ms=0, beside=beside)
    assert all(isinstance(of, Timing) and not of.few and of.calls == 4 for of in results.values())


def test_pairs_are_slices_of_one_round() -> None:
    it = Contenders(a=0.010, b=0.002)
    results = measure(it.calls, it.clock, warm_ms=0, min_ms=0, rounds=20)
    a, b = results["a"], results["b"]
    assert isinstance(a, Timing) and isinstance(b, Timing) and len(a.slices_us) == len(b.slices_us) == 20
    assert timing.paired(a, b) == Paired(*[pytest.approx(5)] * 3)


@pytest.mark.parametrize(("pairs", "want"), [(5, None), (6, (3.5, 1, 6)), (19, (10, 5, 15)), (20, (10.5, 6, 15))])
def test_interval_of_a_ratio_is_that_of_order_statistics(pairs: int, want: tuple[float, float, float] | None) -> None:
    """Ranks as in any table of the confidence limits of a median; drift that both share cancels."""
    drift = [2.0 ** (i % 3) for i in range(pairs)]
    ours, theirs = (
        timing.summarise([Slice([us], []) for us in times])
        for times in (drift, [(i + 1) * d for i, d in enumerate(drift)])
    )
    assert timing.paired(theirs, ours) == (want and Paired(*map(float, want)))


def test_settling_calls_are_not_timed() -> None:
    now = 0.0
    durations = iter([5.0] * 3 + [1.0, 3.0])

    def call() -> None:
        nonlocal now
        now += next(durations)

    part = WallClock(lambda: now).slice(call, 3, 2)
    assert part.times_us == [1e6, 3e6]


def test_a_host_without_memory_is_named_and_not_a_line_of_torch() -> None:
    outcome = timing.attempt(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert outcome.out_of_memory and outcome.reason.startswith("out of memory: can't allocate memory: you tried to")


def test_a_contender_that_cannot_run_is_missing_and_the_others_are_not() -> None:
    it = Contenders(slow=11.0, fine=0.001)

    def broken() -> None:
        raise RuntimeError("no kernel for this. Long story.\nTraceback")

    results = measure({"broken": broken, **it.calls}, it.clock, warm_ms=1, min_ms=1)
    assert results["broken"] == Missing("RuntimeError: no kernel for this")
    assert results["slow"] == Missing("one call takes 11 s, over the limit of 10 s")
    assert isinstance(results["fine"], Timing)
    assert list(results) == ["broken", "slow", "fine"]


def test_summary_of_slices() -> None:
    readings = [timing.Reading(1400.0, 690.0), timing.Reading(1500.0, 700.0)]
    summary = timing.summarise([Slice([3.0, 1.0, 2.0], readings[:1]), Slice([4.0, 100.0], readings[1:])])
    assert (summary.us, summary.p10_us, summary.p90_us, summary.calls) == (3.0, 1.0, 100.0, 5)
    assert (summary.sm_mhz, summary.watts) == (1450.0, 695.0)
    # 695 W for 3 µs are 2085 µJ
    assert summary.energy(1_000_000_000) == {"sm_mhz": 1450.0, "watts": 695.0, "pj_per_flop": pytest.approx(2.085)}
    assert timing.summarise([Slice([3.0], [])]).energy(1) == {}


def test_busy_time_is_the_union_of_kernels_without_annotations() -> None:
    def event(kind: str, start: float, end: float, name: str = "kernel", annotation: bool = False) -> SimpleNamespace:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            device_type=SimpleNamespace(name=kind), time_range=time_range, name=name, is_user_annotation=annotation
        )

    events = [
        event("CUDA", 10, 20), event("CUDA", 15, 18), event("CUDA", 19, 25), event("CUDA", 30, 31),
        event("CPU", 0, 99), event("CUDA", 0, 99, annotation=True), event("CUDA", 0, 99, name="ProfilerStep#1"),
    ]  # fmt: skip
    assert timing.covered(timing.gpu_intervals(events)) == 16
    assert timing.covered([]) == 0


@pytest.mark.gpu
def test_gpu_clock_and_busy_time_agree_on_one_long_kernel() -> None:
    device = torch.device("cuda", 0)
    a_NN = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)  # 30 us
    clock = timing.CudaClock(device)
    for _ in range(50):  # other processes have the GPU every other millisecond or so: attempts are shorter than that
        result = measure({"matmul": lambda: a_NN @ a_NN}, clock, warm_ms=1, min_ms=1)["matmul"]
        assert isinstance(result, Timing)
        wall_us, busy_us = timing.wall_and_busy_us(lambda: a_NN @ a_NN, result.us, warm_ms=1, min_ms=1)
        if busy_us == pytest.approx(result.us, rel=0.15) and 0.9 < wall_us / busy_us < 1.15:
            break
    else:
        pytest.fail(f"fifty times apart: {result.us} us, {busy_us} us busy of {wall_us}")
    cold = timing.CudaClock(device, cold_l2=True).slice(lambda: a_NN @ a_NN, 1, 3)
    assert len(cold.times_us) == 3 and min(cold.times_us) > 0


# ---- the layer suite -----------------------------------------------------------------------------------------------


def quick(device: torch.device = CPU, dtype: torch.dtype = torch.float32, **changes: object) -> LayerConfig:
    return LayerConfig(device, dtype, warm_ms=0, min_ms=0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("activation", "router", "skew"),
    [
        ("swiglu", "softmax_after_topk", 0.0),
        ("geglu", "softmax_before_topk", 1.0),
        ("reglu", "softmax_before_topk_renormalized", 0.0),
        ("relu_sq", "softmax_after_topk", 2.0),
        ("gelu", "softmax_before_topk", 0.0),
        ("silu", "softmax_after_topk", 0.0),
        ("relu", "softmax_after_topk", 0.0),
    ],
)
def test_peers_compute_our_layer(device: torch.device, activation: str, router: str, skew: float) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    result = run_case(SMALL, quick(device, dtype, activation=activation, router=router, skew=skew))
    assert result.missing == {}
    assert list(result.metrics) == [OURS, "torch_loop", "grouped_mm"]
    for metrics in result.metrics.values():
        assert metrics["fwd_bwd_us"] > 0 and metrics["infer_us"] > 0 and metrics["saved_bytes"] > 0
    assert (result.load_ratio > 1.2) if skew else (result.load_ratio < 1.6)


def test_gradients_of_the_peers_are_ours() -> None:
    config = quick()
    torch.manual_seed(0)
    moe = layer._build_layer(SMALL, config)
    grads = {name: c.fwd_bwd() for name, c in layer._contenders(SMALL, config, moe).items()}
    dx, drouter, dw1, dw2 = grads[OURS]
    for name in config.peers:
        peer_dx, peer_drouter, peer_dw1, peer_dw2 = grads[name]
        interleaved = torch.stack(peer_dw1.chunk(2, 1), 2).flatten(1, 2)
        for ours, theirs in ((dx, peer_dx), (drouter, peer_drouter), (dw1, interleaved), (dw2, peer_dw2)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_a_peer_that_computes_something_else_is_not_compared(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setitem(layer.PEERS, "torch_loop", lambda x, *_: x * factor)
    result = run_case(SMALL, quick())
    assert "computes something else" in result.missing["torch_loop"]
    assert list(result.metrics) == [OURS, "grouped_mm"]


def test_a_router_that_peers_lack_leaves_us_alone() -> None:
    result = run_case(SMALL, quick(router="sigmoid_grouped_topk"))
    assert list(result.metrics) == [OURS]
    assert all("softmax" in reason for reason in result.missing.values())
    assert {(row.peer, row.peer_value) for row in report.rows(result)} == {("torch_loop", None), ("grouped_mm", None)}


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_token_rounding_meets_plain_topk(monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """Same weights, both routings in the same rounds, each rate from the rows that its own experts computed."""
    shape, seen = LayerShape(512, 32, 16, 4, 2), []
    forward = layer.MoE.forward

    def spy(self: layer.MoE, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        seen.append((self.training, self.expert_counts.tolist()))
        return result

    monkeypatch.setattr(layer.MoE, "forward", spy)
    result = run_case(shape, quick(router="token_rounding", skew=skew))
    assert result.case == "T512_H32_I16_E4_K2_token_rounding_float32" + ("_skew1" if skew else "")
    ours, plain = result.metrics[OURS], result.metrics[layer.PLAIN]
    assert list(result.metrics) == [OURS, layer.PLAIN] and set(result.missing) == {"torch_loop", "grouped_mm"}
    counts = dict(seen)
    assert all(n % 128 == 0 for n in counts[True]) and any(n % 128 for n in counts[False])
    assert (ours["rows"], plain["rows"]) == (sum(counts[True]), sum(counts[False])) and plain["rows"] == 1024
    for metrics in (ours, plain):
        assert metrics["fwd_bwd_tflops"] * metrics["fwd_bwd_us"] * 1e6 == pytest.approx(18 * metrics["rows"] * 32 * 16)
    recorded = {(row.metric, row.value, row.peer_value) for row in report.rows(result) if row.peer == layer.PLAIN}
    assert ("rows", ours["rows"], plain["rows"]) in recorded


def test_our_own_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SLOWEST_CALL_S", 0.0)
    with pytest.raises(NoResultError, match=r"T96_H32_I16_E4_K2_float32, infer: one call takes"):
        run_case(SMALL, quick())


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    x, w = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    assert layer.saved_bytes(lambda: (x * w) * x.view(10, 10).view(100), [w]) == (2 * 400, 0)  # x once, x * w once


def test_a_call_that_cannot_be_captured_has_no_time_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: object, estimate_us: float, *, warm_ms: float, min_ms: float) -> float:
        assert (warm_ms, min_ms) == (0, 0)
        if estimate_us > 100:
            raise RuntimeError("operation not permitted when stream is capturing")
        return estimate_us / 2

    monkeypatch.setattr(layer, "graph_us", captured)
    for us, want in ((80.0, {"graph_us": 40.0}), (200.0, {})):
        metrics = {"fwd_bwd_us": us}
        layer._record_graph(
            metrics, layer.Contender(lambda _: torch.ones(1), torch.ones(1), [], torch.ones(1)), quick()
        )
        assert metrics == {"fwd_bwd_us": us, **want}


def test_saved_bytes_leaves_no_graph_behind() -> None:
    """A graph that lives on keeps its leaves' nodes, on whose stream a later CUDA graph capture would fail."""
    x = torch.randn(100, requires_grad=True)

    def forward() -> torch.Tensor:
        out = x.exp()  # saves its output
        out.grad_fn.next_functions[0][0].metadata["of"] = "this graph"  # type: ignore[union-attr]
        return out

    assert layer.saved_bytes(forward, []) == (400, 0)
    assert x.exp().grad_fn.next_functions[0][0].metadata == {}, "a new node"  # type: ignore[union-attr]


def test_our_layer_saves_what_the_formula_says() -> None:
    shape = LayerShape(256, 64, 32, 4, 2)
    result = run_case(shape, quick(peers=()))
    formula = saved_activation_bytes(shape, gated=True, element_bytes=4)
    metadata = 4 * (10 * shape.rows + 3 * shape.tokens * shape.experts)  # indices, scores, logits, auxiliary loss
    assert formula <= result.metrics[OURS]["saved_bytes"] <= formula + metadata


def test_fine_grained_layers_keep_the_flops_of_coarser_ones() -> None:
    finest, finer, fine, *_ = LAYER_SETS["fine-grained"]
    assert layer_flops(finest, gated=True) == layer_flops(finer, gated=True) == layer_flops(fine, gated=True)
    assert finest.experts * finest.intermediate == fine.experts * fine.intermediate


def test_case_names() -> None:
    assert LayerConfig(CPU, torch.bfloat16).case_name(REFERENCE) == "T8192_H3072_I1536_E8_K8"
    odd = LayerConfig(CPU, torch.float32, activation="gelu", router="sigmoid_grouped_topk", skew=0.5)
    assert odd.case_name(SMALL) == "T96_H32_I16_E4_K2_gelu_sigmoid_grouped_topk_float32_skew0.5"


# ---- files ---------------------------------------------------------------------------------------------------------

RESULT = CaseResult(
    "T1_H8_I8_E1_K1",
    {
        OURS: {"fwd_us": 10.0, "fwd_bwd_us": 30.0, "fwd_bwd_tflops": 600.0, "sm_mhz": 1480.0},
        "grouped_mm": {"fwd_us": 12.0, "fwd_bwd_us": 45.0, "fwd_bwd_tflops": 400.0, "sm_mhz": 1500.0},
        "torch_loop": {"fwd_us": 5.0},
    },
    {"torch_loop": "fwd_bwd: out of memory"},
)


def test_rows_say_how_many_times_better_we_are() -> None:
    ratios = {(r.metric, r.peer): r.ratio for r in report.rows(RESULT)}
    assert ratios == {
        ("fwd_us", "grouped_mm"): 1.2,
        ("fwd_us", "torch_loop"): 0.5,
        ("fwd_bwd_us", "grouped_mm"): 1.5,
        ("fwd_bwd_us", "torch_loop"): None,
        ("fwd_bwd_tflops", "grouped_mm"): 1.5,
        ("fwd_bwd_tflops", "torch_loop"): None,
        ("sm_mhz", "grouped_mm"): None,
        ("sm_mhz", "torch_loop"): None,
    }
    missing = next(r for r in report.rows(RESULT) if r.metric == "fwd_bwd_us" and r.peer == "torch_loop")
    assert missing.value == 30.0 and missing.peer_value is None


def test_document_has_exactly_the_fields_of_the_evidence_format(tmp_path: Path) -> None:
    report.write_json(tmp_path / "deep" / "layer.json", report.document("layer", [RESULT], CPU, commit="abc"))
    content = json.loads((tmp_path / "deep" / "layer.json").read_text())
    assert list(content) == ["suite", "command", "device", "torch", "commit", "date", "rows"]
    assert content["commit"] == "abc" and content["torch"] == torch.__version__ and content["date"].endswith("+00:00")
    assert list(content["rows"][0]) == ["case", "metric", "value", "unit", "peer", "peer_value", "ratio"]
    assert {m.name for m in report.METRICS} >= {r["metric"] for r in content["rows"]}
    paired = replace(RESULT, pairs={("fwd_us", "grouped_mm"): Paired(1.23456789, 1.2, 1.3)})
    first, *others = report.document("layer", [paired], CPU, commit="abc")["rows"]  # type: ignore[misc]
    assert (first["ratio"], first["interval"]) == (1.23457, (1.2, 1.3))
    assert not any("interval" in row or "calls" in row for row in others)
    few = replace(RESULT, few_calls={("fwd_bwd_us", "grouped_mm"): 2})
    rows = report.document("layer", [few], CPU, commit="abc")["rows"]
    assert [row["metric"] for row in rows if row.get("calls") == 2] == ["fwd_bwd_us"]  # type: ignore[attr-defined]
    shown = Console(width=200).render_lines(report.case_table(few))
    assert "(1.50x, 2 calls)" in "".join(part.text for line in shown for part in line)


def test_commit_is_that_of_the_tree_and_flags_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*args: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        done = subprocess.run(["git", *identity, *args], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    source, old_result = tmp_path / "src" / "report.py", tmp_path / "benchmarks" / "results" / "layer.json"
    for file in (source, old_result):
        file.parent.mkdir(parents=True)
        file.write_text("first")
    monkeypatch.setattr(report, "__file__", str(source))
    assert report.tree_commit() == "unknown"
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")
    assert report.tree_commit() == head
    old_result.write_text("measured again")
    assert report.tree_commit() == head
    source.write_text("changed")
    assert report.tree_commit() == f"{head}-dirty"


def test_short_numbers() -> None:
    assert [report.short(v) for v in (0, 9245.4, 602.12, 52.18, 3.0456, 0.00423)] == [
        "0", "9,245", "602.1", "52.18", "3.046", "0.00423",
    ]  # fmt: skip
