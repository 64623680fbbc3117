"""Every Triton kernel compiles for Hopper, with no GPU present: no spills, wide accesses, and one binary for all
batch sizes.

Run as a script, this file calls each function of the backend the way a layer does, on CPU tensors, with a driver that
names sm_90 as its target and launches nothing; it prints what was compiled as JSON lines. A script, because pytest's
own process may hold Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SRC = Path(__file__).parents[3] / "src"
SUPPORT = Path(__file__).parents[2] / "support"
BATCH_SIZES = (4096, 1, 2, 16, 17, 300)  # many tokens first: few leave out two kernels of a plan
WRITERS = ("quantize", "push_rows._push", "push_rows._take")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # the fixture compiles every kernel, for two minutes or more,
    pytest.mark.xdist_group("compiled triton kernels"),  # in one process for all tests
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{SRC}:{SUPPORT}", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    env |= {"TRITON_DISABLE_LINE_INFO": "1"}  # a tenth of the time, and not one instruction
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=840)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_is_compiled(compiled: list[dict[str, Any]]) -> None:
    defined = {
        f"{path.stem}.{name}"
        for path in (SRC / "supersonic_moe/kernels/triton").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert defined and {c["kernel"] for c in compiled} == defined


def test_no_kernel_spills(compiled: list[dict[str, Any]]) -> None:
    assert [c for c in compiled if c["new"] and (c["stack_bytes"] or c["local_bytes"])] == []


def test_rows_move_in_16_byte_accesses(compiled: list[dict[str, Any]]) -> None:
    modules = {
        "gather_rows",
        "gather_sum",
        "activation",
        "score_gradient",
        "bias_gradient",
        "quantize",
        "dequantize",
        "quantize_saved",
        "scatter_quantized",
        "push_rows",
    }
    moving = [c for c in compiled if c["new"] and c["case"] == "H 2880, I 1536"]
    assert {c["kernel"].split(".")[0] for c in moving} == modules
    assert [c for c in moving if not c["wide_loads"]] == []
    assert [c for c in moving if c["kernel"].startswith(WRITERS) and not c["wide_stores"]] == []


def test_batch_size_is_in_no_jit_key(compiled: list[dict[str, Any]]) -> None:
    kernels = {c["kernel"] for c in compiled}
    assert {c["kernel"] for c in compiled if c["case"].startswith("T ")} == kernels
    assert [c for c in compiled if c["case"].startswith("T ") and c["case"] != f"T {BATCH_SIZES[0]}" and c["new"]] == []


def main() -> None:
    import torch
    import triton
    from offline_hopper import OfflineHopper
    from triton.runtime.jit import JITFunction

    from supersonic_moe.config.activation import Activation, ActivationType, GateUpLayout, as_activation
    from supersonic_moe.config.router import MODES, SigmoidGroupedTopK, SoftmaxAfterTopK, SoftmaxBeforeTopK
    from supersonic_moe.kernels import triton as kernels
    from supersonic_moe.kernels.interface import Banks, Gate, Into, KeptPairs, Rounding, Rows, Slots, Sources, TokenRows
    from supersonic_moe.kernels.triton import pad_segments, quantize, quantize_saved
    from supersonic_moe.kernels.triton.decode import decode
    from supersonic_moe.kernels.triton.scatter_quantized import scatter_quantized

    case = ""
    seen: set[str] = set()
    compile_and_launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        report(f"{self.fn.__module__.rsplit('.', 1)[1]}.{self.fn.__name__}", binary)
        return binary

    def report(name: str, binary: Any) -> None:
        line = {"case": case, "kernel": name, "new": binary.hash not in seen}
        if line["new"]:
            seen.add(binary.hash)
            line |= resources(binary.asm["cubin"])
            line["wide_loads"] = len(re.findall(r"ld\.global\S*\.v4\.b32", binary.asm["ptx"]))
            line["wide_stores"] = len(re.findall(r"st\.global\S*\.v4\.b32", binary.asm["ptx"]))
        print(json.dumps(line), flush=True)

    def resources(cubin: bytes) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
        assert found, usage
        return dict(zip(("registers", "stack_bytes", "local_bytes"), map(int, found.groups()), strict=True))

    triton.runtime.driver.set_active(OfflineHopper())
    JITFunction.run = compile_only
    bf16, i32, layouts = torch.bfloat16, torch.int32, list(GateUpLayout)

    def route(t: int, e: int, k: int, dtype: torch.dtype, router: Any, bias: torch.Tensor | None = None) -> None:
        logits = torch.zeros(t, e, dtype=dtype)
        scores, ids = kernels.route_forward(logits, k, router, bias)
        kernels.route_backward(scores, logits, scores, ids, router)
        sigmoid = isinstance(router, SigmoidGroupedTopK)
        kernels.switch_loss_forward(logits, ids[0, :1].expand(e), sigmoid)
        kernels.switch_loss_backward(scores[0, 0], logits, ids[0, :1].expand(e), sigmoid)
        kernels.pick(scores.view(-1), ids.view(-1))

    def round_tokens(t: int, e: int, k: int, dtype: torch.dtype, scale: float | None, *modes: str) -> None:
        logits, scores, ids = torch.zeros(t, e, dtype=dtype), torch.zeros(t, k), torch.zeros(t, k, dtype=i32)
        for mode in modes:
            step = torch.tensor(5) if mode == "SR-f" else 5
            _, experts, scores_C, _, offsets = kernels.token_rounding_forward(
                logits, scores, ids, Rounding(scale, mode, 128, 2**31 + t, step), t * k
            )
        kernels.token_rounding_backward(scores_C, logits, KeptPairs(scores_C, experts, offsets), scale)

    def plan(t: int, e: int, k: int, dtype: torch.dtype, tile: int, triples: bool = False) -> None:
        ids = torch.zeros(t * k, dtype=dtype)
        kernels.build_plan(Slots(ids, ids if triples else None, k, t, e, tile, t * k + e * (tile - 1)))

    def experts(
        t: int, h: int, i: int, e: int, k: int, dtype: torch.dtype, act: Activation, layout: GateUpLayout, biased: bool
    ) -> None:
        p, n = t * k, i * act.fan
        x, y = torch.zeros(t, h, dtype=dtype), torch.zeros(p, h, dtype=dtype)
        pre, da, index, scores = (
            torch.zeros(p, n, dtype=dtype),
            torch.zeros(p, i, dtype=dtype),
            torch.zeros(p, dtype=i32),
            torch.zeros(p),
        )
        b1, b2 = (torch.zeros(e, n, dtype=dtype), torch.zeros(e, h, dtype=dtype)) if biased else (None, None)
        offsets = torch.full((e + 1,), p, dtype=i32)
        offsets[0] = 0
        kernels.gather_rows(x, index)
        kernels.gather_sum(y, scores, b2, index, TokenRows(index, None, k, t))
        kernels.gather_sum(y, None, None, index, TokenRows(index, torch.zeros(t + 1, dtype=i32), 0, t))
        kernels.activation_forward(pre, b1, index, Gate(act, layout))
        kernels.activation_backward(pre, b1, da, scores, index, Gate(act, layout))
        kernels.segment_sum(Rows(y), scores, offsets)
        kernels.segment_sum(Rows(pre), None, offsets)
        if b2 is not None:
            kernels.row_dot(Rows(y), b2, index, scores)

    def fp8(t: int, h: int, i: int, pow2: bool) -> None:
        x, w = torch.zeros(t, h, dtype=bf16), torch.zeros(2, i, h, dtype=bf16)
        index = torch.zeros(128 * t, dtype=i32)
        rows = quantize.quantize_rows(x, pow2)
        gathered = quantize.quantize_rows(x, pow2, tma=True)
        kernels.dequantize_rows(rows)
        scatter_quantized(gathered, x, None, index.view(t, 128)[:, :8].contiguous(), 7, None, pow2)
        scatter_quantized(gathered, rows.q, rows.scale, index.view(t, 128)[:, :1].contiguous(), 1)
        quantize.quantize_blocks(w, pow2)
        quantize.quantize_weights((w, w.mT.contiguous()), pow2)
        quantize_saved(x)
        quantize.quantize_columns(x, index, pow2)
        quantize.quantize_columns(x, index, pow2, tiled=True)
        quantize.quantize_both_orders(x, index, pow2)

    def travel(t: int, h: int, k: int, ranks: int) -> None:
        """Rows of x, and of the gradients of scores, of ``t`` tokens."""
        for rows in (torch.zeros(ranks * t, h // 2, dtype=i32), torch.zeros(ranks * t, k, dtype=i32)):
            bank, table = rows.view(-1).view(torch.uint8), torch.zeros(ranks, dtype=torch.int64)
            through = Banks([bank] * ranks, table, t % ranks, t, 0, t)
            needed = kernels.needed_rows(torch.zeros(ranks * t, k, dtype=i32), t, ranks)
            kernels.push_rows(rows[:t], needed[1:].view(t, ranks), rows[:t], through)
            kernels.push_back(rows, needed, through)
            kernels.take_rows(rows, needed, through)

    def few_rows(
        t: int, h: int, i: int, e: int, k: int, dtype: torch.dtype, act: Activation, layout: GateUpLayout, biased: bool
    ) -> None:
        n, gate = i * act.fan, Gate(act, layout)
        x, ids, scores = torch.zeros(t, h, dtype=dtype), torch.zeros(t, k, dtype=torch.int64), torch.zeros(t, k)
        if biased:  # and turned, as gpt-oss
            w1, w2 = torch.empty(e, h, n, dtype=dtype).mT, torch.empty(e, i, h, dtype=dtype).mT
            decode(x, ids, scores, w1, torch.zeros(e, n, dtype=dtype), w2, torch.zeros(e, h, dtype=dtype), gate)
        else:
            w1, w2 = torch.empty(e, n, h, dtype=dtype), torch.empty(e, h, i, dtype=dtype)
            decode(x, ids, scores, w1, None, w2, None, gate)

    def fp16_products(t: int, h: int, n: int, e: int) -> None:
        rows, w = torch.zeros(t, h, dtype=torch.float16), torch.zeros(e, n, h, dtype=torch.float16)
        offsets = torch.zeros(e + 1, dtype=i32)
        z = kernels.grouped_mm(Rows(rows), w.mT, offsets)
        kernels.grouped_mm(Rows(z), w, offsets)
        kernels.grouped_mm_wgrad(Rows(rows), z, offsets, Into(torch.zeros(e, h, n), accumulate=True))
        kernels.grouped_mm_wgrad(Rows(rows), z, offsets, Into(transposed=True))

    for e, k in ((1, 1), (60, 4), (128, 8), (512, 10), (4096, 64)):
        case = f"E {e}, K {k}"
        route(40, e, k, torch.float32, SoftmaxAfterTopK())
        route(40, e, k, bf16, SoftmaxBeforeTopK())
        route(40, e, k, torch.float32, SigmoidGroupedTopK(), torch.zeros(e))
        round_tokens(40, e, k, bf16, None, "NR-f")
        round_tokens(40, e, k, torch.float32, 2.5, "SR-f")
        plan(40, e, k, i32, 1)
        pad_segments(torch.zeros(e + 1, dtype=i32), torch.zeros(40, dtype=i32), 256)
        kernels.departures_everywhere(torch.zeros(40, k, dtype=i32), 4 * e, 4, 50)
        kernels.row_parts(torch.zeros(e + 1, dtype=i32), torch.zeros(40, dtype=i32), Sources(1, 3, 10))
    case = "E 256 in 8 groups, K 8"
    route(40, 256, 8, torch.float32, SigmoidGroupedTopK(num_groups=8, topk_groups=4), torch.zeros(256))
    case = "token rounding"
    round_tokens(40, 256, 8, bf16, None, *MODES)
    case = "triples"
    plan(40, 4096, 8, torch.int64, 128, triples=True)

    case = "decode"
    few_rows(2, 2880, 2880, 32, 4, bf16, Activation.gpt_oss(), GateUpLayout.INTERLEAVED, biased=True)
    few_rows(2, 2048, 768, 128, 8, bf16, as_activation("swiglu"), GateUpLayout.GATE_UP, biased=False)
    few_rows(2, 2688, 1856, 128, 6, bf16, as_activation("relu_sq"), GateUpLayout.GATE_UP, biased=False)
    few_rows(2, 7168, 2048, 256, 8, torch.float16, as_activation("geglu"), GateUpLayout.UP_GATE, biased=False)
    case = "H 2880, I 1536"
    for pow2 in (False, True):
        fp8(40, 2880, 1536, pow2)
    travel(40, 2880, 4, 8)
    for layout in layouts:
        experts(40, 2880, 1536, 32, 4, bf16, Activation.gpt_oss(), layout, biased=True)
    for kind in ActivationType:
        experts(40, 2880, 1536, 128, 8, bf16, as_activation(kind), layouts[0], biased=False)
    for dtype in (torch.float16, torch.float32):
        case = str(dtype)
        experts(40, 1024, 512, 8, 8, dtype, as_activation("swiglu"), layouts[0], biased=True)
    case = "fp16 products"
    for h, n, e in ((2880, 3072, 32), (104, 40, 4096)):
        fp16_products(40, h, n, e)
    case = "H 7168, I 2048, E 4096"
    experts(40, 7168, 2048, 4096, 8, bf16, as_activation("geglu"), layouts[1], biased=True)
    case = "scores"
    kernels.pick(torch.zeros(40, dtype=torch.float64), torch.zeros(80, dtype=i32), bf16)
    case = "H 100, I 36"
    experts(40, 100, 36, 8, 3, bf16, as_activation("swiglu"), layouts[0], biased=True)

    for t in BATCH_SIZES:
        case = f"T {t}"
        route(t, 64, 2, bf16, SoftmaxAfterTopK())
        round_tokens(t, 64, 2, bf16, None, "NR-f", "NR-s", "Balance-f")
        plan(t, 64, 2, i32, 128)
        experts(t, 64, 32, 64, 2, bf16, as_activation("swiglu"), layouts[0], biased=True)
        few_rows(t, 64, 32, 64, 2, bf16, as_activation("swiglu"), GateUpLayout.GATE_UP, biased=False)
        fp8(t, 64, 32, pow2=False)
        travel(t, 64, 8, 4)
        pad_segments(torch.zeros(65, dtype=i32), torch.zeros(t, dtype=i32), 128 * t)
        kernels.departures_everywhere(torch.zeros(t, 2, dtype=i32), 64, 4, 2 * t)
        kernels.row_parts(torch.zeros(65, dtype=i32), torch.zeros(t, dtype=i32), Sources(t % 3, 3, t))
        rows = torch.zeros(16 * t, 64, dtype=bf16)
        offsets = torch.tensor([0, *[16 * t] * 64], dtype=i32)
        kernels.grouped_mm_wgrad(Rows(rows), rows, offsets)
        kernels.zero_dead_rows(rows, offsets)
        fp16_products(16 * t, 64, 32, 64)


if __name__ == "__main__":
    main()
