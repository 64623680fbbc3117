"""`bench check`, and the pages that set us beside other libraries: files made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from supersonic_moe.bench import readme

Rows = dict[tuple[str, str, str], tuple[float | None, tuple[float, float] | None]]

USUAL: Rows = {
    ("T1", "fwd_us", "sonicmoe"): (1.10, (1.09, 1.11)),
    ("T1", "fwd_bwd_us", "sonicmoe"): (1.05, (1.04, 1.06)),
    ("T1", "fwd_bwd_us", "grouped_mm"): (1.80, None),
    ("T2", "fwd_bwd_us", "sonicmoe"): (1.20, (1.19, 1.21)),
    ("T2", "saved_bytes", "sonicmoe"): (2.0, None),
    ("T2", "fwd_bwd_us", "liger"): (None, None),
}


def write(path: Path, rows: Rows, **changes: Any) -> Path:
    listed = []
    for (case, metric, peer), (ratio, interval) in rows.items():
        theirs = None if ratio is None else 1000.0 * ratio
        row = {"case": case, "metric": metric, "value": 1000.0, "unit": "us", "peer": peer, "peer_value": theirs}
        listed.append(row | {"ratio": ratio} | ({"interval": interval} if interval else {}))
    content = dict(suite="layer", command="c", device="GPU", torch="2", commit="abc", date="2026-01-01", rows=listed)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content | changes))
    return path


@pytest.mark.parametrize(
    ("rows", "changes", "found"),
    [
        (USUAL, {}, []),
        ({k: (r and r * 0.98, i) for k, (r, i) in USUAL.items()}, {}, []),
        (
            USUAL | {("T1", "fwd_bwd_us", "grouped_mm"): (1.70, None)},
            {},
            ["T1 · fwd_bwd_us · grouped_mm: 1.700, below"],
        ),
        # an interval that reaches the bar of 1.164 passes, one that does not fails
        (USUAL | {("T2", "fwd_bwd_us", "sonicmoe"): (1.15, (1.13, 1.17))}, {}, []),
        (
            USUAL | {("T2", "fwd_bwd_us", "sonicmoe"): (1.15, (1.14, 1.16))},
            {},
            ["T2 · fwd_bwd_us · sonicmoe: 1.150, at most 1.160, below 1.164 (it was 1.200)"],
        ),
        (
            {k: v for k, v in USUAL.items() if k[2] != "sonicmoe" or k[0] == "T2"},
            {},
            ["T1 · fwd_us · sonicmoe: missing; it was 1.100", "T1 · fwd_bwd_us · sonicmoe: missing; it was 1.050"],
        ),
        (USUAL | {("T1", "fwd_us", "sonicmoe"): (None, None)}, {}, ["T1 · fwd_us · sonicmoe: missing"]),
        ({k: v for k, v in USUAL.items() if k[0] == "T1"}, {}, ["T2 · fwd_bwd_us · sonicmoe: missing"]),
        (USUAL, {"device": "another GPU"}, ["device is 'another GPU'"]),
        (USUAL, {"suite": "gemm"}, ["suite is 'gemm'"]),
    ],
    ids=str,
)
def test_nothing_passes_that_is_behind_or_absent(
    rows: Rows, changes: dict[str, Any], found: list[str], tmp_path: Path
) -> None:
    fresh = write(tmp_path / "fresh" / "layer.json", rows, **changes)
    write(tmp_path / "old" / "layer.json", USUAL)
    result = run("bench", "check", str(fresh), "--committed", str(tmp_path / "old"), columns=400)
    lines = result.output.splitlines()
    assert result.exit_code == bool(found)
    assert len(lines) == max(1, len(found))
    assert all(want in line for want, line in zip(found, lines, strict=False)), lines


def test_weights_that_are_held_are_checked_too(tmp_path: Path) -> None:
    """They have a metric, and a column of the page, of their own."""
    held: Rows = USUAL | {("T2", "held_us", "sonicmoe"): (1.70, (1.69, 1.71))}
    fresh = write(tmp_path / "fresh" / "layer-fp8.json", held)
    write(tmp_path / "old" / "layer-fp8.json", held)
    check = "bench", "check", str(fresh), "--committed", str(tmp_path / "old")
    assert run(*check).exit_code == 0
    page = readme.performance(tmp_path / "fresh")
    assert "the same, weights quantized before: ours, µs" in page and "| 1.700 (1.690–1.710) |" in page
    write(fresh, USUAL)
    result = run(*check, columns=400)
    assert result.exit_code == 1 and "T2 · held_us · sonicmoe: missing; it was 1.700" in result.output


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda fresh, old: fresh.unlink(), "cannot read {fresh}: No such file or directory. Name a file"),
        (lambda fresh, old: old.unlink(), "cannot read {old}: No such file or directory. Name a file"),
        (lambda fresh, old: fresh.write_bytes(b"\xff\xfe"), "cannot read {fresh}: it is no text. Name a file"),
        (lambda fresh, old: fresh.write_text("{"), "{fresh} is not JSON: Expecting property name"),
        (lambda fresh, old: fresh.write_text("[]"), "{fresh} must hold suite, command"),
        (
            lambda fresh, old: fresh.write_text(fresh.read_text().replace('"case"', '"kind"')),
            "each row of {fresh} must hold case, metric",
        ),
        (lambda fresh, old: write(old, {("T1", "fwd_us", "sonicmoe"): (None, None)}), "{old}: no row has a ratio"),
    ],
    ids=["no fresh file", "no committed file", "no text", "no JSON", "no result", "no row", "no ratio"],
)
def test_what_cannot_be_checked_fails_in_a_sentence(damage: Any, sentence: str, tmp_path: Path) -> None:
    fresh, old = (write(tmp_path / folder / "layer.json", USUAL) for folder in ("fresh", "old"))
    damage(fresh, old)
    result = run("bench", "check", str(fresh), "--committed", str(tmp_path / "old"), columns=400)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert result.output.startswith(sentence.format(fresh=fresh, old=old)) and len(result.output.splitlines()) == 1


def test_pages_quote_a_library_only_where_it_ran_in_the_same_file(tmp_path: Path) -> None:
    assert readme.performance(tmp_path) == readme.NO_LIBRARY
    torch_only = {("T1", "fwd_bwd_us", "grouped_mm"): (1.80, None)}
    write(tmp_path / "layer-bf16.json", torch_only | {("T1", "fwd_bwd_us", "sonicmoe"): (None, None)})
    write(tmp_path / "layer-fp8.json", {("T1_fp8", "fwd_bwd_us", "ours-BF16"): (1.5, None)})
    assert readme.performance(tmp_path) == readme.NO_LIBRARY
    head, _, line = readme.headline(tmp_path).splitlines()[:3]
    assert head == "| layer | BF16, µs | TFLOP/s | vs torch | FP8, µs | TFLOP/s | vs our BF16 |"
    assert line == "| T1 | 1,000 | – | 1.80× | 1,000 | – | 1.50× |"

    write(tmp_path / "layer-bf16.json", USUAL)
    lines = [line for line in readme.performance(tmp_path).splitlines() if line]
    assert lines[0] == "### BF16 beside SonicMoE" and len([line for line in lines if line.startswith("###")]) == 1
    assert lines[4:] == [
        "| `T1` | 1,000 | 1,100 | 1.100 (1.090–1.110) | 1,000 | 1,050 | 1.050 (1.040–1.060) |",
        "| `T2` | – | – | – | 1,000 | 1,200 | 1.200 (1.190–1.210) |",
        "| geometric mean |  |  | 1.10× (1 of 2) |  |  | 1.12× |",
        "SonicMoE takes less time in no case.",
    ]
    head, _, line = readme.headline(tmp_path).splitlines()[:3]
    assert head == "| layer | BF16, µs | TFLOP/s | vs torch | vs SonicMoE | FP8, µs | TFLOP/s | vs our BF16 |"
    assert line == "| T1 | 1,000 | – | 1.80× | 1.05× | 1,000 | – | 1.50× |"
    assert "*vs SonicMoE*: its layer, in BF16, in the same process. BF16: GPU" in readme.headline(tmp_path)

    slower: Rows = {
        ("T1", "fwd_us", "sonicmoe"): (0.98, (0.97, 0.99)),
        ("T2", "fwd_us", "sonicmoe"): (1.0, (0.99, 1.01)),
    }
    write(tmp_path / "layer-bf16.json", USUAL | slower)
    assert readme.performance(tmp_path).endswith(
        "SonicMoE takes less time: forward at `T1`. Not told apart, for 1 is in the interval: forward at `T2`."
    )
