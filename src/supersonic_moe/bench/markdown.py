"""Generated Markdown: a table, its cells, and where the numbers of a results file come from."""

from __future__ import annotations

from typing import Any

from supersonic_moe.bench.report import METRICS, geomean, short

_METRICS = {metric.name: metric for metric in METRICS}


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def origin(content: dict[str, Any]) -> str:
    return f"{content['device']}, torch {content['torch']}, {commit_and_day(content)}"


def commit_and_day(content: dict[str, Any]) -> str:
    commit, _, dirty = content["commit"].partition("-")
    return f"commit `{commit[:12]}{'-' + dirty if dirty else ''}`, {content['date'][:10]}"


def metric_label(name: str) -> str:
    return _METRICS[name].label.strip()


def number(name: str, value: float | None) -> str:
    return "–" if value is None else short(value / _METRICS[name].shown_in)


def times(ratio: float | None) -> str:
    return "missing" if ratio is None else f"{ratio:.2f}×"


def mean(ratios: list[float | None]) -> str:
    """The geometric mean, and of how many cases where the peer lacks some."""
    found = [ratio for ratio in ratios if ratio is not None]
    share = f" ({len(found)} of {len(ratios)})" if found and len(found) < len(ratios) else ""
    return times(geomean(found) if found else None) + share
