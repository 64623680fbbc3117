"""The kernels suite on a CPU: what must move against what does, both backends on equal operands, files and figures."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import QUICK, run, words
from matplotlib import pyplot
from matplotlib.text import Text
from rich.console import Console
from torch import Tensor
from typer.testing import Result

from supersonic_moe.bench import kernel_figure, kernels, readme, report
from supersonic_moe.bench.kernels import CEILINGS, GROUPS, KernelsResult, kernel_calls, kernel_table, run_case
from supersonic_moe.bench.layer import LayerConfig
from supersonic_moe.bench.timing import NoResultError, Timing, WallClock, in_graphs, of_a_call
from supersonic_moe.kernels import reference
from supersonic_moe.kernels.interface import Segments
from supersonic_moe.perf_model import STEP_KERNELS, LayerShape, kernel_steps

CPU = torch.device("cpu")
SHAPE = LayerShape(40, 48, 16, 4, 2)
NAMES = list(itertools.chain.from_iterable(GROUPS.values()))


def config(**changes: Any) -> LayerConfig:
    return LayerConfig(**(dict(device=CPU, dtype=torch.float32, peers=(), warm_ms=0, min_ms=0) | changes))


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setitem(kernels.MATMUL_SIDE, "cpu", 32)


# ---- floors ----------------------------------------------------------------------------------------------------------


def test_flops_and_bytes_by_hand() -> None:
    steps = kernel_steps(LayerShape(200, 256, 128, 4, 2), gated=True)  # R = 400, N1 = 256, G = 400 + 4 * 127 -> 896
    x, w1, w2 = 2 * 200 * 256, 2 * 4 * 256 * 256, 2 * 4 * 256 * 128  # bytes in bf16
    h, a, y, index, scores = 2 * 400 * 256, 2 * 400 * 128, 2 * 400 * 256, 4 * 400, 4 * 400
    logits, up, down = 2 * 200 * 4, 2 * 400 * 256 * 256, 2 * 400 * 256 * 128
    plan = 5 * index + 4 * 5  # ids in; token, slot and expert of rows and row of slots out; offsets
    by_hand = {
        "route_forward": (0, logits + scores + index),
        "build_plan": (0, plan),
        "route_and_plan": (0, logits + scores + index + plan),
        "route_backward": (0, 2 * scores + index + logits),
        "up_projection": (up, x + w1 + h + a + index),
        "up_projection_inference": (up, x + w1 + a + index),
        "grouped_mm_y": (down, a + w2 + y),
        "gather_sum_out": (0, y + scores + index + x),
        "down_backward": (down, x + w2 + 2 * h + a + 2 * scores + index),
        "wgrad_dw2": (down, x + a + w2 + index),
        "wgrad_dw2_accumulate": (down, x + a + 2 * 2 * w2 + index),  # fp32, read and written
        "wgrad_dw1": (up, x + h + w1 + index),
        "wgrad_dw1_accumulate": (up, x + h + 2 * 2 * w1 + index),
        "grouped_mm_dx": (up, h + w1 + y),
        "gather_sum_dx": (0, y + index + x),
        "quantize_rows_x": (0, x + x // 2 + 4 * 200 * 2),
        "quantize_blocks_w1": (0, 2 * w1 + 4 * 4 * 2 * 2),
        "quantize_blocks_w2": (0, 2 * w2 + 4 * 4 * 2 * 1),
        "quantize_columns_x": (0, x + 4 * 896 + 896 * 256 + 4 * 256 * 7),
        "quantize_both_orders_dz": (0, h + h // 2 + 4 * 400 * 2 + 4 * 896 + 896 * 256 + 4 * 2 * 7),
    }
    assert {name: (step.flops, step.bytes) for name, step in steps.items()} == by_hand


def test_experts_without_rows_cost_nothing_when_accumulating() -> None:
    one_row, dtype = LayerShape(1, 64, 32, 8, 1), 4
    steps = kernel_steps(one_row, gated=False, element_bytes=dtype)
    stored, added = (steps[name].bytes for name in ("wgrad_dw1", "wgrad_dw1_accumulate"))
    assert stored - added == dtype * 8 * 32 * 64 - 2 * 4 * 1 * 32 * 64


def tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Segments):  # what is read of them beside the index
        value = value.offsets, value.source
    return sum(map(tensor_bytes, value)) if isinstance(value, tuple | list) else 0


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in tensors(part)]


def test_the_bytes_are_those_of_the_tensors_that_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands and results of every call, each once; the floor leaves out offsets and an int32 for each row at most."""
    moved, depth, called = 0, 0, set()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal moved, depth
            called.add(function.__name__)
            depth += 1
            result = function(*args, **kwargs)
            depth -= 1
            if depth == 0:  # some are made of others
                moved += sum(map(tensor_bytes, (args, tuple(kwargs.values()), result)))
            return result

        return call

    for name in ("route_forward", "build_plan", "route_backward", "up_projection", "grouped_mm", "gather_sum",
                 "down_backward", "grouped_mm_wgrad", "quantize_rows", "quantize_weights", "quantize_columns",
                 "quantize_both_orders"):  # fmt: skip
        monkeypatch.setattr(reference, name, counting(getattr(reference, name)))
    calls = kernel_calls(SHAPE, config())
    called.clear()
    steps = kernel_steps(SHAPE, gated=True, element_bytes=4)
    assert set(calls) == set(steps) == set(NAMES) and len(NAMES) == 20
    for name, call in calls.items():
        moved = -4 * SHAPE.tokens * SHAPE.experts if name == "route_backward" else 0  # softmax needs no logits again
        call()
        metadata = 4 * (SHAPE.rows + SHAPE.experts + 1)
        assert steps[name].bytes <= moved <= steps[name].bytes + metadata, name
    assert called >= set(STEP_KERNELS.values())


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_both_backends_compute_the_same_from_the_same_operands() -> None:
    """So every signature, layout and dtype that a kernel of the GPU backends gets is one that it takes."""
    pytest.importorskip("triton")
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        calls = kernel_calls(SHAPE, config(dtype=torch.bfloat16, backend=backend))
        results.append({name: call() for name, call in calls.items()})
    T, H, N1, I, E, R = 40, 48, 32, 16, 4, 80  # noqa: E741
    shapes = {name: result.shape for name, result in results[0].items() if isinstance(result, Tensor)}
    assert shapes == {
        "route_backward": (T, E), "grouped_mm_y": (R, H), "gather_sum_out": (T, H), "wgrad_dw2": (E, H, I),
        "wgrad_dw2_accumulate": (E, H, I), "wgrad_dw1": (E, N1, H), "wgrad_dw1_accumulate": (E, N1, H),
        "grouped_mm_dx": (R, H), "gather_sum_dx": (T, H),
    }  # fmt: skip
    assert [part.shape for part in results[0]["up_projection"]] == [(R, N1), (R, I)]
    assert [part.shape for part in results[0]["up_projection_inference"]] == [(0, N1), (R, I)]
    for name in NAMES:
        ours, truth = (result[name] for result in results)
        if name == "route_and_plan":
            ours, truth = ((plan.expert_offsets, plan.gather_index, plan.token_rows) for plan in (ours, truth))
        for got, want in zip(tensors(ours), tensors(truth), strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype, name
            torch.testing.assert_close(got.float(), want.float(), rtol=0.02, atol=0.02, equal_nan=True, msg=name)


@pytest.mark.usefixtures("small_ceilings")
def test_every_kernel_is_timed_beside_its_floor() -> None:
    result = run_case(SHAPE, config(dtype=torch.bfloat16))
    assert result.case == str(SHAPE) and result.missing == {}
    assert set(result.metrics) == {*NAMES, *CEILINGS}
    copy, matmul = (result.metrics[name] for name in CEILINGS)
    assert copy["gbps"] == pytest.approx(2**16 / copy["us"] / 1e3) and "tflops" not in copy
    assert matmul["tflops"] == pytest.approx(2 * 32**3 / matmul["us"] / 1e6)
    for name, step in kernel_steps(SHAPE, gated=True).items():
        m = result.metrics[name]
        assert (m["flops"], m["bytes"]) == (step.flops, step.bytes) and ("tflops" in m) == bool(step.flops)
        floor = max(step.flops / matmul["tflops"] / 1e6, step.bytes / copy["gbps"] / 1e3)
        assert m["floor_us"] == pytest.approx(floor) and m["of_floor"] == pytest.approx(floor / m["us"])
        assert m["gbps"] == pytest.approx(step.bytes / m["us"] / 1e3)


def test_short_calls_are_captured_and_a_replay_is_timed_as_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls, graph = 0.0, 0, SimpleNamespace(replay=object())

    def call(seconds: float) -> None:
        nonlocal now, calls
        now, calls = now + seconds, calls + 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda captured: nullcontext(captured is graph or pytest.fail()))
    clock = WallClock(lambda: now)
    before = 5  # the first call, one untimed and three timed
    for seconds, graphs, want in ((99e-6, True, 11), (99e-6, False, 1), (2e-3, True, 1)):
        calls, one = 0, partial(call, seconds)
        assert in_graphs(one, clock, graphs) == (graph.replay if want > 1 else one, want)
        assert calls == before + (want if want > 1 else 0)

    timing = of_a_call(Timing(us=90.0, p10_us=60.0, p90_us=120.0, calls=4, sm_mhz=1400.0, watts=600.0), 30)
    assert timing == Timing(us=3.0, p10_us=2.0, p90_us=4.0, calls=120, sm_mhz=1400.0, watts=600.0)
    assert "pj_per_flop" not in kernels._rates(0, 10, timing) and kernels._rates(0, 10, timing)["watts"] == 600
    assert kernels._rates(10**9, 10, timing)["pj_per_flop"] == pytest.approx(600 * 3e-6 / 1e9 * 1e12)


@pytest.mark.parametrize("ceiling", CEILINGS)
@pytest.mark.usefixtures("small_ceilings")
def test_without_a_ceiling_there_is_no_result(monkeypatch: pytest.MonkeyPatch, ceiling: str) -> None:
    def broken() -> None:
        raise RuntimeError("too hot")

    ceilings = kernels._ceiling_calls(config())
    monkeypatch.setattr(kernels, "_ceiling_calls", lambda _: ceilings | {ceiling: broken})
    with pytest.raises(NoResultError, match=rf"without {ceiling} nothing has a floor: RuntimeError: too hot\."):
        run_case(SHAPE, config())


# ---- files and figures -----------------------------------------------------------------------------------------------


def h200_result(seed: int) -> KernelsResult:
    """The reference layer, each kernel at 80 to 99 % of its floor, the routing far from it."""
    draw, shape = random.Random(seed), LayerShape(8192, 3072, 1536, 8, 8)

    def timing(us: float) -> Timing:
        return Timing(us, 0.99 * us, 1.01 * us, 9, 1400.0, 690.0)

    result = KernelsResult(str(shape))
    ceilings = {"copy": timing(2**31 / 4.26e6), "matmul": timing(2 * 8192**3 / 678e6)}
    machine = kernels.Machine("H200", 678e12, math.nan, 4.26e12, "")
    for name, step in kernel_steps(shape, gated=True).items():
        floor = step.roofline_us(machine)
        us = floor / draw.uniform(0.8, 0.99) if floor > 10 else floor + draw.uniform(3, 9)
        result.metrics[name] = kernels._beside_floor(step, timing(us), machine)
    result.metrics["copy"] = kernels._rates(0, 2**31, ceilings["copy"])
    result.metrics["matmul"] = kernels._rates(2 * 8192**3, 6 * 8192**2, ceilings["matmul"])
    return result


def text_of(result: KernelsResult) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(kernel_table(result))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_table_from_the_file_is_the_table_that_was_shown(tmp_path: Path) -> None:
    results, file = [h200_result(0), h200_result(1)], tmp_path / "kernels.json"
    results[1].case = "other"
    for metrics in (metrics for result in results for metrics in result.metrics.values()):
        metrics |= {name: report._rounded(value) for name, value in metrics.items()}  # as the file has them
    cases = [case for result in results for case in result.cases()]
    report.write_json(file, report.document("kernels", cases, CPU, commit="abc"))
    again = kernels.results_of(json.loads(file.read_text())["rows"])
    assert [text_of(result) for result in again] == [text_of(result) for result in results]
    lines = text_of(again[0]).splitlines()
    assert max(map(len, lines)) <= 100 and [line.strip() for line in lines if line.strip() in GROUPS] == list(GROUPS)
    (row,) = (line.split() for line in lines if "grouped_mm_y" in line)
    assert row[0] == "grouped_mm_y" and row[2] == "±1.0%" and row[5:8] == ["912.2", row[6], "1,400"]
    assert readme.results(tmp_path, tmp_path / "page.md") == readme.NOTHING_YET  # its figure is for docs/


@pytest.mark.parametrize("seed", [0, 3])
def test_no_label_of_the_roofline_covers_another(seed: int) -> None:
    figure = kernel_figure.draw(h200_result(seed), "title")
    roofline, bars = figure.axes
    (zoom,) = roofline.child_axes
    labelled = {axis: [text for text in axis.texts if text.get_text()] for axis in (roofline, zoom, bars)}
    assert [len(texts) for texts in labelled.values()] == [11, 9, 20]
    assert {text.get_text().split()[0] for axis in (roofline, zoom) for text in labelled[axis]} == set(NAMES)
    for axis, texts in labelled.items():
        extents = [Text.get_window_extent(text) for text in texts]  # without the line to the point
        frame = axis.get_window_extent()
        obstacles = [child.get_tightbbox() for child in axis.child_axes]
        for one, other in itertools.combinations([*extents, *obstacles], 2):
            assert not one.overlaps(other)
        assert all(frame.x0 <= e.x0 and e.x1 <= frame.x1 and frame.y0 <= e.y0 and e.y1 <= frame.y1 for e in extents)
    pyplot.close(figure)


def command(*args: str) -> Result:
    return run("bench", "kernels", *args, columns=100)


@pytest.mark.usefixtures("small_ceilings")
def test_command_prints_writes_and_draws(tmp_path: Path) -> None:
    file = tmp_path / "results" / "kernels.json"
    shapes = ["--shape", "40,48,16,4,2", "--shape", "24,16,8,2,1"]
    result = command(*QUICK, *shapes, "--json", str(file), "--png", str(tmp_path / "figures" / "kernels.png"))
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    assert all(word in result.output for word in [*NAMES, *CEILINGS, *GROUPS])
    content = json.loads(file.read_text())
    assert content["suite"] == "kernels" and {row["peer"] for row in content["rows"]} == {None}
    cases = {f"{case}_float32/{name}" for case in (SHAPE, "T24_H16_I8_E2_K1") for name in [*NAMES, *CEILINGS]}
    assert {row["case"] for row in content["rows"]} == cases
    figures = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in figures] == [
        "kernels-T24_H16_I8_E2_K1_float32.png", "kernels-T40_H48_I16_E4_K2_float32.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 50_000 for path in figures)


@pytest.mark.usefixtures("small_ceilings")
def test_a_kernel_that_fails_is_named_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no such instruction. Long story.")

    monkeypatch.setattr(reference, "gather_sum", broken)
    file = tmp_path / "kernels.json"
    result = command(*QUICK, "--shape", "40,48,16,4,2", "--json", str(file), "--png", str(tmp_path / "kernels.png"))
    assert result.exit_code == 1
    for name in ("gather_sum_out", "gather_sum_dx"):
        assert f"failed {name}: RuntimeError: no such instruction" in result.output
    measured = {row["case"].partition("/")[2] for row in json.loads(file.read_text())["rows"]}
    assert measured == {*NAMES, *CEILINGS} - {"gather_sum_out", "gather_sum_dx"}
    assert (tmp_path / "kernels.png").stat().st_size > 50_000


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--shape", "0,32,16,4,2"], "T must be at least 1; got T0_H32_I16_E4_K2"),
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--backend", "sm90"], "backend 'sm90' cannot run this call"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], complaint: str) -> None:
    result = command("--device", "cpu", *args)
    assert result.exit_code == 2
    assert complaint in words(result)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_command_on_a_gpu(device: torch.device, tmp_path: Path, backend: str) -> None:
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    file = tmp_path / "kernels.json"
    options = ["--backend", backend, "--min-ms", "5", "--warm-ms", "5", "--json", str(file)]
    result = command("--shape", "2048,1024,512,8,2", "--shape", "300,512,264,128,4", *options)
    assert result.exit_code == 0, result.output
    metrics = {(row["case"], row["metric"]): row["value"] for row in json.loads(file.read_text())["rows"]}
    for name in NAMES:
        assert 0 < metrics[f"T2048_H1024_I512_E8_K2/{name}", "of_floor"] < 10, name
