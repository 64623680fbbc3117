"""``bench exchange``: alone, and as under torchrun: two processes on a CPU, over gloo."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exchange_bench
import pytest
import results_files
import torch
from command_line import QUICK, run, words
from ranks import end_ranks, run_ranks

from supersonic_moe.bench import exchange, readme
from supersonic_moe.bench.exchange import CPU_CASES, ExchangeResult, Tables
from supersonic_moe.bench.exchange_beside import OUTLAST, Beside, Load, LoadedClock, on_fewer
from supersonic_moe.bench.report import OURS
from supersonic_moe.bench.timing import NoResultError, Slice
from supersonic_moe.kernels.sm90 import gemm_config

PARTS = {"final_sum", "packing", "staging", "departures", "departures_everywhere", "choices_message"}


def rows_of(file: Path) -> dict[tuple[str, str], float]:
    return {(row["case"], row["metric"]): row["value"] for row in json.loads(file.read_text())["rows"]}


def test_parts_of_one_rank_stand_beside_copies_of_as_many_bytes(tmp_path: Path) -> None:
    file = tmp_path / "exchange.json"
    result = run("bench", "exchange", *QUICK, "--json", str(file))
    assert result.exit_code == 0, result.output
    found = rows_of(file)
    for case in map(str, CPU_CASES):
        for part in PARTS:
            us, size, gbps = (found[f"{case}/{part}", metric] for metric in ("us", "bytes", "gbps"))
            assert gbps == pytest.approx(size / us / 1e3, rel=1e-3)
            copy = found[f"{case}/{exchange._copy_of(int(size))}", "gbps"]
            assert found[f"{case}/{part}", "of_copy"] == pytest.approx(gbps / copy, rel=1e-3)


def test_bytes_are_what_must_be_read_and_written() -> None:
    """T 64, H 32, K 2, R 2: a row is 64 bytes. Packing reads each token once, and its index; so S copies are known."""
    case = Tables(64, 32, 8, 2, 2)
    size = {name: part.bytes for name, part in exchange.parts_of(case, torch.device("cpu")).items()}
    copies, rest = divmod(size["packing"] - 64 * 64, 64 + 4)
    assert rest == 0 and 64 < copies < 128
    assert size["final_sum"] == copies * 64 + 64 * 2 * 4 + 64 * 64
    assert size["staging"] == 2 * 64 * 64
    assert size["choices_message"] == 2 * (64 * 2 * 8) + 2 * (2 * 64 * 2 * 8)


def test_a_part_that_fails_is_missing_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no addresses today")

    monkeypatch.setattr(exchange, "copy_bytes", broken)
    result = run("bench", "exchange", *QUICK)
    assert result.exit_code == 1
    assert words(result).count("failed staging: RuntimeError: no addresses today") == len(CPU_CASES)
    assert "final_sum" in result.output


@pytest.mark.parametrize(
    ("ranks", "part", "said"),
    [("1", "copies", "a part is of several ranks"), ("2", "music", "a part is one of copies, kernels, all_to_all")],
)
def test_parts_that_there_are_not_are_refused(
    ranks: str, part: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    result = run("bench", "exchange", *QUICK, "--part", part)
    assert result.exit_code == 2 and said in words(result)


# ---- two ranks -------------------------------------------------------------------------------------------------------


def test_ranks_that_do_not_reach_each_other_say_so_and_measure_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "exchange.json"
    for code, output in run_ranks(2, exchange_bench.measured, "--json", str(file), backend=None):
        assert code == 0, output
        assert output.count("not over NCCL") == 5 and "missing begin_and_meet: the group runs over" in output
    found = rows_of(file)
    assert {case for case, _ in found} == {"all_to_all/64KiB", "all_to_all/128KiB", "gemm/alone", "flags/barrier"}
    assert found["all_to_all/64KiB", "bytes"] == 1 << 16 and found["gemm/alone", "slowdown"] == 1


def test_ranks_that_reach_each_other_push_and_pull_and_tell(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "exchange.json"
    args = (tmp_path, "--json", str(file), "--part", "copies", "--part", "kernels", "--part", "flags")
    for code, output in run_ranks(2, exchange_bench.with_memory, *args, backend=None):
        assert code == 0 and "missing" not in output, output
    found = rows_of(file)
    for way in ("push", "pull"):
        for name in (f"copies/{way}_128KiB", *(f"kernels/{way}_{n}blocks_64KiB" for n in (4, 8, 16, 24))):
            us, size, gbps = (found[name, metric] for metric in ("us", "bytes", "gbps"))
            assert gbps == pytest.approx(size / us / 1e3, rel=1e-3)
    assert found["flags/begin_and_meet", "us"] > 0 and ("flags/begin_and_meet", "gbps") not in found


def test_wrong_bytes_of_one_rank_have_no_time_and_other_parts_follow(tmp_path: Path) -> None:
    args = (1, tmp_path, "--part", "copies", "--part", "flags")
    for code, output in run_ranks(2, exchange_bench.wrong_on, *args, backend=None):
        assert code == 1 and "begin_and_meet" in output, output
        said = " ".join(output.split())
        assert "No result: copies: rank 0 has other bytes than were to come by push." in said, said


def test_nobody_waits_for_ever_for_a_rank_that_is_stuck(tmp_path: Path) -> None:
    """What was measured before is there."""
    file = tmp_path / "exchange.json"
    args = (1, "--json", str(file), "--part", "all_to_all", "--part", "gemm", "--part", "flags")
    waits, stuck = end_ranks(2, exchange_bench.stuck_on, *args, backend=None, timeout_s=40)
    assert stuck.exit_code == 1 and "Timeout" in stuck.stderr and "_stay" in stuck.stderr, stuck
    said = " ".join(waits.result[1].split())
    assert waits.result[0] == 1 and "barrier" not in said
    assert "No result: gemm: RuntimeError: another rank has ended, or has not come within 2 s." in said
    assert {case for case, _ in rows_of(file)} == {"all_to_all/64KiB", "all_to_all/128KiB"}


# ---- products beside loads -------------------------------------------------------------------------------------------


class Pretended:
    """A clock whose calls take 2 ms each, and a load that lasts as long as it was asked to, or less."""

    def __init__(self, lasts: float) -> None:
        self.us, self.end_us, self.lasts, self.waited = 0.0, 0.0, lasts, 0

    def slice(self, call: Any, settle: int, calls: int) -> Slice:
        self.us += 2000 * (settle + calls)
        return Slice([2000.0] * calls, [])

    def start(self, us: float) -> Any:
        self.end_us = self.us + self.lasts * us
        return SimpleNamespace(query=lambda: self.us >= self.end_us, synchronize=self._wait)

    def _wait(self) -> None:
        self.waited, self.us = self.waited + 1, max(self.us, self.end_us)


def test_a_load_outlasts_the_products_beside_it() -> None:
    clock = Pretended(1.0)
    beside, loaded = Beside(lambda: None, clock, 1000.0), LoadedClock(clock)  # type: ignore[arg-type]
    assert loaded.slice(beside, 1, 3).times_us == [2000.0] * 3
    assert clock.us == clock.end_us == OUTLAST * 4 * 3000  # three times as long as alone, to begin with
    loaded.slice(beside, 1, 3)
    assert clock.us == OUTLAST * 4 * (3000 + 2000) and clock.waited == 2, "then as long as it took"
    loaded.slice(lambda: None, 0, 1)
    assert clock.waited == 2


def test_a_load_that_ends_first_gives_no_result() -> None:
    clock = Pretended(0.4)
    with pytest.raises(NoResultError, match="ended first"):
        LoadedClock(clock).slice(Beside(lambda: None, clock, 1000.0), 1, 3)  # type: ignore[arg-type]
    assert clock.waited == 1


def test_a_load_has_as_many_moves_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda side: asked.append(side) or nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=asked.append))
    Load(asked.append, 300.0, "side").start(1000.0)
    assert asked == ["side", 4, "side"]


def test_products_on_fewer_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_config, "multiprocessors", lambda device: 132)
    every = gemm_config.multiprocessors
    seen = on_fewer(8, lambda: torch.tensor(gemm_config.bf16_form(256, 2, False).grid(0)))
    assert seen.tolist() == [124, 1, 1]
    with pytest.raises(ZeroDivisionError):
        on_fewer(8, lambda: torch.tensor(1 // 0))
    assert gemm_config.multiprocessors is every


def test_blocks_that_stay_copy_every_byte_and_no_other() -> None:
    pytest.importorskip("triton")
    from supersonic_moe.bench.exchange_kernel import TILE_BYTES, copy_bytes_by

    source, to = torch.randint(0, 256, (5 * TILE_BYTES,), dtype=torch.uint8), torch.zeros(7 * TILE_BYTES).byte()
    copy_bytes_by(to[TILE_BYTES:-TILE_BYTES], source, blocks=2, times=2)
    assert torch.equal(to[TILE_BYTES:-TILE_BYTES], source)
    assert not to[:TILE_BYTES].any() and not to[-TILE_BYTES:].any()
    with pytest.raises(ValueError, match="the same whole number of 65536 bytes; got 327680 and 458752"):
        copy_bytes_by(to, source, blocks=2)
    with pytest.raises(ValueError, match="got 65535 and 65535"):
        copy_bytes_by(to[: TILE_BYTES - 1], source[: TILE_BYTES - 1], blocks=2)


# ---- pages, GPUs -----------------------------------------------------------------------------------------------------


def test_results_show_parts(tmp_path: Path) -> None:
    metrics = {"final_sum": {"us": 20.0, "gbps": 3600.0, "of_copy": 0.9}, "copy_3MB": {"us": 18.0, "gbps": 4000.0}}
    results_files.write(tmp_path / "exchange-world1.json", "exchange", ExchangeResult("A", metrics).cases())
    text = readme.results(tmp_path, tmp_path / "results.md")
    assert "| `A/final_sum` | 20 | 3,600 | 90 |" in text and "| `A/copy_3MB` | 18 | 4,000 |" in text
    assert OURS not in text


@pytest.mark.gpu
def test_one_gpu_measures_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CASES", [Tables(1024, 512, 32, 8, 4)])
    file = tmp_path / "exchange.json"
    result = run("bench", "exchange", "--min-ms", "1", "--warm-ms", "1", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert PARTS | {"begin_and_meet"} <= {case.partition("/")[2] for case, _ in rows_of(file)}


@pytest.mark.multigpu
def test_two_gpus_measure_all_parts(tmp_path: Path) -> None:
    file = tmp_path / "exchange.json"
    args = ("--min-ms", "5", "--warm-ms", "1", "--json", str(file))
    for code, output in run_ranks(2, exchange_bench.on_gpus, *args, backend=None, gpu=True, timeout_s=200):
        assert code == 0 and "missing" not in output, output
    found = rows_of(file)
    assert found["gemm/free_8_beside_push_8blocks", "slowdown"] > 0.9
    assert found["copies/push_64MiB", "gbps"] > 100 and found["flags/begin_and_meet", "us"] > 0
