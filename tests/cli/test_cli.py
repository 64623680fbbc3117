"""The command line: every command end to end on a CPU, one sentence for bad input, doctor's verdicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import QUICK, run, words
from typer.testing import Result

import supersonic_moe
from supersonic_moe.bench import options
from supersonic_moe.bench.shapes import LAYER_SETS
from supersonic_moe.cli import explain, health, warmup
from supersonic_moe.config.recipe import Bf16Recipe, Fp8Recipe
from supersonic_moe.jit import cache
from supersonic_moe.jit.build import BuildResult
from supersonic_moe.jit.cache import CACHE_DIR_VARIABLE, Cubin, CubinCache, default_cache
from supersonic_moe.jit.nvrtc import CompileError, CompileReport, KernelResources
from supersonic_moe.kernels import registry
from supersonic_moe.kernels.interface import CAPABILITIES, functions_of
from supersonic_moe.kernels.sm90 import launch_probe, self_test
from supersonic_moe.perf_model import STEP_KERNELS, LayerShape, fp8_step_kernels

SHAPE = "64,32,16,4,2"
COMMANDS = ("doctor", "demo", "warmup", "bench", "explain", "cache")


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CubinCache]:
    """An empty kernel cache of this test's own, as the default one."""
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path / "kernels"))
    default_cache.cache_clear()
    yield default_cache()
    default_cache.cache_clear()


def test_module_runs_without_installation() -> None:
    source = str(Path(supersonic_moe.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "supersonic_moe", "--help"],
        env={**os.environ, "PYTHONPATH": source, "COLUMNS": "80"},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert all(command in done.stdout for command in COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_version() -> None:
    assert run("--version").output.strip() == supersonic_moe.__version__


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["explain"], "Missing option '--shape'"),
        (["explain", "--shape", "1,2,3"], "a shape is five whole numbers T,H,I,E,K"),
        (["explain", "--shape", "8,8,8,4,5"], "K must not exceed E"),
        (["explain", "--shape", SHAPE, "--activation", "tanh"], "unknown activation 'tanh'"),
        (["explain", "--shape", SHAPE, "--device", "tpu"], "a device is cpu, cuda or cuda:N; got 'tpu'"),
        (["explain", "--shape", SHAPE, "--device", "cuda:77"], "got 'cuda:77'. Use --device cpu"),
        (["explain", "--shape", SHAPE, "--dtype", "int8"], "a dtype is one of"),
        (["bench", "layer", "--shape", "a,b,c,d,e"], "a shape is five whole numbers T,H,I,E,K"),
        (["bench", "layer", "--activation", "tanh"], "unknown activation 'tanh'"),
        (["bench", "layer", "--router", "dice"], "unknown router 'dice'"),
        (["bench", "layer", "--peers", "torch_loop,magic"], "unknown peer 'magic'"),
        (["bench", "layer", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["bench", "layer", "--skew", "-1"], "'--skew'"),
        (["bench", "layer", "--png", "chart.txt"], "a chart is a file in .png, .svg, .pdf; got chart.txt"),
        (["bench", "layer", "--json", "."], "cannot write to .: it is a folder"),
        (["warmup", "--compile-only", "--shape", SHAPE], "--compile-only runs nothing"),
        (["warmup", "--compile-only", "--scale", "pow2"], "Add --recipe fp8"),
        (["warmup", "--workers", "0"], "'--workers'"),
        (["demo", "--device", "cuda:77"], "got 'cuda:77'"),
        (["demo", "--seed", str(2**70)], "'--seed'"),
        (["bench", "layer", "--set", "coarse"], "a set is one of default, fine-grained, short; got 'coarse'"),
        (["bench", "layer", "--set", "default", "--shape", SHAPE], "by --shape or by --set, not both"),
        (["bench", "layer", "--recipe", "int4"], "a recipe is bf16 or fp8; got 'int4'"),
        (["bench", "layer", "--wgrad", "fp8"], "Add --recipe fp8"),
        (["bench", "layer", "--recipe", "fp8", "--scale", "ue8"], "Fp8Recipe.scale must be one of 'fp32', 'pow2'"),
        (["explain", "--shape", SHAPE, "--recipe", "fp8", "--dtype", "float16"], "an FP8 layer takes bfloat16"),
        (["bench", "gemm", "--case", "gemm:1,2,3"], "a case is one of ref_up,"),
        (["bench", "gemm", "--device", "cpu"], "got cpu, a CPU"),
        (["bench", "gemm", "--precision", "int4"], "a precision is bf16 or fp8; got 'int4'"),
        (["bench", "cold-start", "--shape", "1,2"], "a shape is five whole numbers T,H,I,E,K"),
        (["bench", "cold-start", "--repeats", "0"], "'--repeats'"),
        (["bench", "bakery"], "No such command 'bakery'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(args: list[str], expected: str) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert expected in words(result)
    assert "Traceback" not in result.output


# ---- bench, explain, demo ------------------------------------------------------------------------------------------


def test_bench_layer_prints_and_writes(tmp_path: Path) -> None:
    file, chart = tmp_path / "results" / "layer.json", tmp_path / "layer.png"
    options = ["--device", "cpu", "--min-ms", "1", "--warm-ms", "1", "--json", str(file), "--png", str(chart)]
    result = run("bench", "layer", "--shape", SHAPE, "--shape", "0,32,16,4,2", *options, columns=80)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80
    for word in ("T64_H32_I16_E4_K2_float32", "torch_loop", "grouped_mm", "forward + backward", "geometric mean"):
        assert word in result.output
    content = json.loads(file.read_text())
    assert content["suite"] == "layer" and content["device"].startswith("CPU")
    rows = [row for row in content["rows"] if row["case"] == "T64_H32_I16_E4_K2_float32"]
    assert {row["metric"] for row in rows} >= {"infer_us", "fwd_us", "fwd_bwd_us", "fwd_bwd_tflops", "saved_bytes"}
    assert {row["peer"] for row in rows} == {"torch_loop", "grouped_mm"}
    assert all(row["value"] > 0 and row["peer_value"] > 0 for row in rows if row["metric"] == "fwd_bwd_us")
    assert chart.read_bytes().startswith(b"\x89PNG") and chart.stat().st_size > 10_000


def test_bench_layer_takes_a_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYER_SETS, "fine-grained", (LayerShape(9, 16, 8, 4, 2),))
    result = run("bench", "layer", "--set", "fine-grained", *QUICK)
    assert result.exit_code == 0 and "T9_H16_I8_E4_K2_float32" in result.output


@pytest.mark.gpu
def test_bench_layer_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "layer.json"
    result = run(
        "bench", "layer", "--shape", "2048,1024,512,8,2", "--min-ms", "40", "--warm-ms", "40", "--json", str(file)
    )
    assert result.exit_code == 0, result.output
    ours = {row["metric"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    assert {"busy_us", "wall_us", "wall_over_busy", "peak_bytes", "saved_bytes", "fwd_bwd_tflops"} <= ours.keys()
    assert 0 < ours["host_one_thread_us"] < 10 * ours["host_us"]
    assert 0 < ours["busy_us"] < 1.2 * ours["wall_us"]
    assert ours["peak_bytes"] > ours["saved_bytes"]
    assert ("mfu" in ours) == bool(health.hopper())


def test_bench_layer_names_a_missing_peer() -> None:
    result = run(
        "bench", "layer", "--shape", SHAPE, *QUICK,
        "--router", "sigmoid_grouped_topk", "--peers", "grouped_mm",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "missing grouped_mm: NotImplementedError: the PyTorch peers route by softmax only" in result.output


def test_bench_layer_without_a_result_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("supersonic_moe.bench.timing.SLOWEST_CALL_S", 0.0)
    file = tmp_path / "layer.json"
    result = run("bench", "layer", "--shape", SHAPE, "--device", "cpu", "--json", str(file))
    assert result.exit_code == 1 and "No result: T64_H32_I16_E4_K2_float32, infer: one call" in result.output
    assert not file.exists()


def test_explain_shows_every_step_with_its_floor() -> None:
    result = run("explain", "--shape", "8192,3072,1536,8,8", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "experts  reference: " in result.output and "routing  reference: " in result.output
    rows = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert set("12345678") <= rows.keys() and {"router", "top-k", "metadata"} <= rows.keys()
    assert "1,819.0" in rows["1"] and "compute" in rows["1"]
    assert "432.0 MiB" in result.output and "5.566 T with backward" in result.output
    assert "kernels/reference/grouped_mm.py" in result.output
    in_fp32 = words(run("explain", "--shape", SHAPE, "--dtype", "float32", "--device", "cpu"))
    assert "floor µs" not in in_fp32 and "no floor in float32" in in_fp32


def test_explain_knows_the_fp8_recipe() -> None:
    options = ["--shape", "8192,3072,1536,8,8", "--device", "cpu", "--recipe", "fp8"]
    result = run("explain", *options, "--wgrad", "fp8", "--save-preactivation", "bf16")
    assert result.exit_code == 0, result.output
    rows = {line.partition("  ")[0]: line for line in result.output.splitlines()}
    assert {*"12345678", "q W", "q X", "q dO", "segments", "q dO^T", "q X^T"} <= rows.keys()
    assert "963.4" in rows["1"] and "compute" in rows["1"]  # 1237 GFLOP at 1284 TFLOP/s
    assert "grouped_mm_wgrad_fp8" in result.output and "432.0 MiB" in result.output
    other = run("explain", *options, "--wgrad", "bf16").output
    assert "q X^T" not in other and "246.0 MiB" in other


@pytest.mark.parametrize("backend", [name for name in registry.BACKENDS if name != "auto"])
def test_explain_names_kernels_that_exist(backend: str) -> None:
    found = registry.kernels(backend)
    has = {name for what, protocol in CAPABILITIES.items() if getattr(found, what) for name in functions_of(protocol)}
    fp8 = fp8_step_kernels(Fp8Recipe(wgrad="fp8")) | fp8_step_kernels(Fp8Recipe(save_preactivation="recompute"))
    kernels = {*STEP_KERNELS.values(), *(fp8.values() if backend != "triton" else ())}
    assert kernels <= has
    assert (backend in explain.TILES) == (backend != "sm90")


def test_explain_prints_the_tiles_that_would_run() -> None:
    shape = LayerShape(8192, 3072, 1536, 8, 8)
    assert explain._tiles(shape, True, Bf16Recipe()) == (
        "128 x 256 x 64 in 4 stages, pairs of blocks share B: step 1, 2, 4, 6; "
        "128 x 384 x 64 in 3 stages, pairs of blocks share B: step 5, 7"
    )
    mixed = explain._tiles(shape, True, Fp8Recipe(wgrad="bf16"))
    assert mixed.startswith("128 x 256 x 128 in 3 stages, pairs of blocks share A: step 1, 4; ")
    assert mixed.endswith("128 x 384 x 64 in 3 stages, pairs of blocks share B: step 5, 7")


def test_demo_gets_the_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("supersonic_moe.demo.train.run", lambda **options: seen.update(options))
    result = run("demo", "--steps", "3", "--device", "cpu", "--out", str(tmp_path), "--seed", "7")
    assert result.exit_code == 0, result.output
    assert seen == {"steps": 3, "seconds": None, "device": "cpu", "out": tmp_path, "seed": 7}


# ---- warmup and cache ----------------------------------------------------------------------------------------------


def test_warmup_compiles_everything_once(
    kernel_cache: CubinCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything registered: a few kernels here, since test_sm90_compile.py compiles them all."""
    few = (*launch_probe.SPECS, *self_test.SPECS[:4])
    monkeypatch.setattr("supersonic_moe.kernels.sm90.registered_specs", lambda: few)
    monkeypatch.setattr("supersonic_moe.jit.build.PATIENCE_S", 0.0)
    assert "0 compiled kernels" in run("cache", "info").output
    first = run("warmup", "--compile-only", "--workers", "2")
    assert first.exit_code == 0, first.output
    assert f"{len(few)} of {len(few)} kernels ready in" in first.output
    assert len(first.output.splitlines()) <= 3, "the progress bar and the verdict"
    assert not caplog.records, "the progress bar alone tells that it takes long"
    kernels = len(kernel_cache.info().entries)  # fewer, where two specs are entries of one program
    kernel_cache._memory.clear()
    assert "disk" in run("warmup", "--compile-only").output

    listing = run("cache", "info").output
    assert f"{kernels} compiled kernels" in listing and listing.count(" ok") == kernels
    damaged = next(kernel_cache.directory.glob("*.cubin"))  # type: ignore[union-attr]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "(1 damaged)" in run("cache", "info").output
    assert f"Removed {kernels} compiled kernels" in run("cache", "clear").output
    assert kernel_cache.info().entries == ()


@pytest.mark.parametrize("args", [[], ["--recipe", "fp8", "--wgrad", "fp8"]], ids=["bf16", "fp8"])
def test_warmup_runs_the_layers_in_their_recipe(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    seen = []
    forward = supersonic_moe.MoE.forward

    def spy(self: supersonic_moe.MoE, *operands: object, **how: object) -> object:
        seen.append(self.recipe)
        return forward(self, *operands, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(supersonic_moe.MoE, "forward", spy)
    monkeypatch.setattr("supersonic_moe.jit.compile_all", lambda specs, progress, workers: [])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    run_once = warmup._run_once
    monkeypatch.setattr(warmup, "_run_once", lambda layer, device, recipe: run_once(layer, torch.device("cpu"), recipe))
    monkeypatch.setattr(options, "device", lambda name: torch.device("cuda", 0))
    result = run("warmup", "--shape", "32,64,32,4,2", *args)
    assert result.exit_code == 0, result.output
    assert seen == 2 * [Fp8Recipe(wgrad="fp8") if args else Bf16Recipe()]


def test_warmup_reports_spills_and_failures(kernel_cache: CubinCache, monkeypatch: pytest.MonkeyPatch) -> None:
    spilled = Cubin(b"", CompileReport((KernelResources("k", 255, 0, 8, 16, 0),), (), 0.1))
    results = [
        BuildResult("good", spilled, None, 0.1),  # type: ignore[arg-type]
        BuildResult("bad[N=1]", None, CompileError("line 3: no"), 0.2),  # type: ignore[arg-type]
    ]
    monkeypatch.setattr("supersonic_moe.jit.compile_all", lambda specs, progress, workers: results)
    result = run("warmup", "--compile-only")
    assert result.exit_code == 1
    assert " 255 " in result.output and " 24 " in result.output
    assert "bad[N=1] line 3: no" in result.output and "1 of 2 kernels ready" in result.output


# ---- doctor --------------------------------------------------------------------------------------------------------


def ok(name: str = "thing") -> health.Check:
    return health.Check(name, "ok", "here")


def doctor(monkeypatch: pytest.MonkeyPatch, *checks: Callable[[], health.Check]) -> Result:
    monkeypatch.setattr(health, "all_checks", lambda: list(checks))
    return run("doctor", columns=80)


def test_doctor_on_this_machine(kernel_cache: CubinCache) -> None:
    result = run("doctor", "--json")
    content = json.loads(result.output)
    assert content["usable"] is True and result.exit_code == 0
    status = {check["name"]: check["status"] for check in content["checks"]}
    assert status["python"] == status["pytorch"] == status["self test"] == "ok"
    assert status["gpu"] == ("ok" if health.hopper() else "warn")
    assert all(set(check) == {"name", "status", "found", "fix"} for check in content["checks"])
    assert all(check["fix"] for check in content["checks"] if check["status"] != "ok")


def test_warnings_leave_it_usable_and_failures_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    warned = doctor(monkeypatch, ok, lambda: health.Check("gpu", "warn", "none", "buy one"))
    assert warned.exit_code == 0 and "buy one" in warned.output and "Usable. Warnings: 1." in warned.output
    failed = doctor(monkeypatch, ok, lambda: health.Check("pytorch", "fail", "1.0", "upgrade"))
    assert failed.exit_code == 1 and "upgrade" in failed.output and "Not usable: pytorch." in failed.output


def test_a_check_that_breaks_is_a_failure_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def self_test() -> health.Check:
        raise OSError("libcuda is odd")

    result = doctor(monkeypatch, ok, self_test)
    assert result.exit_code == 1
    assert "OSError: libcuda is odd" in result.output and "Not usable: self test." in result.output
    assert "Traceback" not in result.output


def test_doctor_tells_what_is_wrong(monkeypatch: pytest.MonkeyPatch, kernel_cache: CubinCache) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert health.pytorch().status == "fail" and "torch>=2.10" in health.pytorch().fix

    monkeypatch.setattr(health, "gpus", lambda: range(1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert health.triton().status == "fail" and "cuda13" in health.triton().fix
    monkeypatch.setattr(health, "gpus", lambda: range(0))
    assert health.triton().status == "warn" and "layers on this machine do without" in health.triton().found

    assert health.kernel_cache().status == "ok"
    assert kernel_cache.directory is not None
    kernel_cache.directory.rmdir()
    kernel_cache.directory.write_text("a file where the directory should be")
    assert health.kernel_cache().status == "warn" and CACHE_DIR_VARIABLE in health.kernel_cache().fix


def test_doctor_tells_what_the_package_carries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shipped = pytest.importorskip("supersonic_moe.kernels.triton.shipped")
    for owner, name, folder in ((shipped, "FOLDER", "triton"), (cache, "SHIPPED_CUBINS", "cuda")):
        monkeypatch.setattr(owner, name, tmp_path / folder)
    shipped.index.cache_clear()
    assert health.compiled_kernels().found == "none in the package: each is compiled at its first use"

    for folder in ("triton", "cuda"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cuda" / "some.cubin").write_bytes(b"")
    for digest, status in ((shipped.digest(), "ok"), ("of other sources", "warn")):
        index = {"digest": digest, "variants": {name: ["f", "g", 32, 0, [], 0] for name in ("a", "b")}}
        (tmp_path / "triton" / shipped.INDEX).write_text(json.dumps(index))
        shipped.index.cache_clear()
        assert health.compiled_kernels().status == status
        if status == "ok":
            assert health.compiled_kernels().found == "in the package: 1 in CUDA, 2 in Triton"
    shipped.index.cache_clear()


def test_doctor_on_a_mocked_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = SimpleNamespace(plain_us=3.2, tensor_map_us=4.6)
    monkeypatch.setattr(health, "gpus", lambda: range(2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda i: nullcontext())
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: True)
    monkeypatch.setattr(health, "_nvlinks", lambda i: 18)
    monkeypatch.setattr(self_test, "run_self_test", lambda i: self_test.SelfTestResult(i == 0, f"detail {i}"))
    monkeypatch.setattr(launch_probe, "measure_launch_overhead", lambda: overhead)

    names = [check.__name__ for check in health.all_checks()]
    assert names[2:4] == ["gpu", "driver"] and {"peer_access", "symmetric_memory", "launch_overhead"} <= set(names)
    status = {(0, 1): 0, (1, 0): 2}
    nvml = SimpleNamespace(
        NVML_P2P_CAPS_INDEX_NVLINK=2,
        NVML_P2P_STATUS_OK=0,
        NVMLError=RuntimeError,
        nvmlDeviceGetP2PStatus=lambda i, j, what: status[i, j],
    )
    monkeypatch.setattr("supersonic_moe.bench.sensor.open_nvml", lambda device: (nvml, device.index))
    assert health.peer_access().found.split("\n") == [
        "from \\ to  cuda:0  cuda:1",
        "cuda:0     -       NVLink   18 NVLinks",
        "cuda:1     PCIe    -   18 NVLinks",
    ]
    monkeypatch.setattr("supersonic_moe.bench.sensor.open_nvml", lambda device: None)
    assert "cuda:0     -       P2P" in health.peer_access().found
    broken = health.self_test()
    assert broken.status == "fail" and "cuda:1 detail 1" in broken.found
    assert health.launch_overhead().status == "ok" and "4.6 µs" in health.launch_overhead().found
    overhead.tensor_map_us = 9.9
    assert health.launch_overhead().status == "warn"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: False)
    assert health.peer_access().status == "warn" and "cuda:1     none    -" in health.peer_access().found


@pytest.mark.parametrize(
    ("cuda", "device_there", "expected"),
    [(None, False, "nothing to fix"), (None, True, "this torch is a CPU build"), ("13.0", True, "update it")],
)
def test_doctor_says_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, device_there: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(health, "_gpu_present", lambda: device_there)
    check = health.gpu()
    assert check.status == "warn" and expected in check.fix
