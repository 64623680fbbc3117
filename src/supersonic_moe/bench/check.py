"""Whether a fresh result file is still as far ahead of its peers as the committed one: ``supersonic-moe bench check``.

Times of two days or two cards differ by 5 %, ratios inside one run do not: so ratios are compared. Every ratio that the
committed file has must be in the fresh one and be no lower, but for a tolerance; where it has an interval, the interval
must reach that far. Nothing passes by being absent: a file, a case, a metric or a peer that is missing is a finding,
and so is a file that lacks cases of its own command.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supersonic_moe.bench.readme import SUITES, read
from supersonic_moe.bench.report import Row

COMPARED = {name: (shown.compared,) for name, shown in SUITES.items()} | {"layer": ("fwd_us", "fwd_bwd_us", "held_us")}


def findings(fresh: Path, committed: Path, tolerance: float) -> list[str]:
    """A line for everything that is wrong with ``fresh``; none if all is well. ``tolerance`` is a fraction."""
    contents = []
    for path in (fresh, committed):
        try:
            contents.append(read(path))
        except OSError as error:
            return [f"cannot read {path}: {error.strerror}. Name a file that `supersonic-moe bench` wrote."]
        except ValueError as error:
            return [str(error)]
    new, old = contents
    if wrong := [
        f"{fresh}: {what} is {new[what]!r}, and {old[what]!r} in {committed}. Measure the same on the same."
        for what in ("suite", "device")
        if new[what] != old[what]
    ]:
        return wrong
    if old["suite"] not in COMPARED:
        return [f"{committed}: the suite {old['suite']!r} has no peers. Check one of {', '.join(COMPARED)}."]
    bars = _ratios(old)
    if not bars:
        return [f"{committed}: no row has a ratio to a peer, so nothing can be checked. Measure it with peers."]
    return [f"{fresh}: {line}" for line in _lower(_ratios(new), bars, tolerance)]


def _lower(found: dict[tuple[str, str, str], Row], bars: dict[tuple[str, str, str], Row], by: float) -> Iterator[str]:
    for key, bar in bars.items():
        what, least = " · ".join(key), (bar.ratio or 0.0) * (1 - by)
        row = found.get(key)
        if row is None:
            yield f"{what}: missing; it was {bar.ratio:.3f}"
        elif not (best := row.interval[1] if row.interval else row.ratio or 0.0) >= least:
            text = f"{row.ratio:.3f}" + (f", at most {best:.3f}" if row.interval else "")
            yield f"{what}: {text}, below {least:.3f} (it was {bar.ratio:.3f})"


def _ratios(content: dict[str, Any]) -> dict[tuple[str, str, str], Row]:
    """By case, metric and peer."""
    rows = [Row(**row) for row in content["rows"] if row["metric"] in COMPARED[content["suite"]]]
    return {(row.case, row.metric, row.peer): row for row in rows if row.peer and row.ratio is not None}
