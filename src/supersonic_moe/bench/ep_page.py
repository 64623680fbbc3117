"""What expert parallelism costs a training step, for docs/expert-parallel.md.

``one_rank``: files of one rank beside their goals: the step, the host, FP8 products in parts.
``ranks``: files of several ranks beside the plain layer of the same load and beside a *model*, made before any run from
copy-engine rates of 345 GB/s and times of one GPU (docs/log-2026-11-29.md has how): *serial* hides nothing, *ranges*
hides copies behind products. A results file that is not there leaves dashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from supersonic_moe.bench.ep_contenders import BY_HAND, ONE_GPU
from supersonic_moe.bench.ep_parts import ONE_LAUNCH
from supersonic_moe.bench.markdown import markdown, origin
from supersonic_moe.bench.report import Row
from supersonic_moe.perf_model import LayerShape

PRECISIONS = ("bf16", "fp8")
RANKS = (2, 4, 8)
ONE_RANK_GOAL, RANKS_GOAL, HOST_GOAL_US = 1.01, 1.08, 60.0
PARTS_GOALS = {2: 1.02, 4: 1.04}
Contents = Mapping[str, dict[str, Any]]
"""Results files by their names."""


def files() -> list[str]:
    return [f"ep-{where}-{p}" for where in ("world1", *(f"{ranks}gpu" for ranks in RANKS)) for p in PRECISIONS]


@dataclass(frozen=True)
class Predicted:
    """µs of forward and backward; ``steps``: serial and ranges at each of ``RANKS``."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    of_all: bool  # experts of all ranks together, or of each
    top_k: int
    precision: str
    one_gpu: int
    steps: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        experts = f"{self.experts} experts {'in all' if self.of_all else 'a rank'}"
        return f"{self.name}: H {self.hidden} I {self.intermediate}, {experts}, K {self.top_k}"

    def case(self, ranks: int) -> str:
        """Where it starts like that in a file."""
        here = self.experts // ranks if self.of_all else self.experts
        return f"{LayerShape(TOKENS, self.hidden, self.intermediate, here, self.top_k)}_R{ranks}"


TOKENS = 8192
_REFERENCE = ("reference", 3072, 1536, 8, False, 8)
_FLASH = ("DeepSeek-V4 Flash", 4096, 2048, 32, False, 6)
_QWEN = ("Qwen3-30B-A3B", 2048, 768, 128, True, 8)
MODEL = (
    Predicted(*_REFERENCE, "bf16", 8977, ((9760, 9220), (10940, 9430), (12230, 9620))),
    Predicted(*_REFERENCE, "fp8", 5670, ((6300, 5900), (7200, 6090), (8200, 6270))),
    Predicted(*_FLASH, "bf16", 12600, ((13610, 12880), (14930, 13110), (16150, 13290))),
    Predicted(*_FLASH, "fp8", 8530, ((9340, 8800), (10350, 9000), (11290, 9160))),
    Predicted(*_QWEN, "bf16", 3604, ((4150, 3810), (4910, 3970), (5760, 4120))),
    Predicted(*_QWEN, "fp8", 2630, ((3080, 2820), (3660, 2980), (4310, 3120))),
)

# ---- one rank --------------------------------------------------------------------------------------------------------


def one_rank(contents: Contents) -> str:
    """The step and the host of both files, and products in parts of the FP8 one."""
    found = {p: contents[f"ep-world1-{p}"] for p in PRECISIONS if f"ep-world1-{p}" in contents}
    if not found:
        return "One rank was not measured with the kernels of this commit yet: `supersonic-moe bench ep`."
    sections = [" ".join(f"{p.upper()}: {origin(content)}." for p, content in found.items())]
    columns = dict[str, dict[str, str]]()  # cells by heading and shape
    verdicts = []
    for precision, content in found.items():
        name, steps, hosts = precision.upper(), _by_case(content, "fwd_bwd_us"), _by_case(content, "host_us")
        beyond = {case: more for case, row in hosts.items() if (more := _more(row)) is not None}
        columns[f"{name}: step over the plain layer's"] = {_shape(case): _over(row) for case, row in steps.items()}
        columns[f"{name}: host beyond it, µs"] = {_shape(case): f"{more:+.0f}" for case, more in beyond.items()}
        verdicts.append(_reached(f"{name}, at most {ONE_RANK_GOAL:g} of the plain layer's time", steps, ONE_RANK_GOAL))
        verdicts.append(_within(f"{name}, at most {HOST_GOAL_US:g} µs more of the host", beyond))
    parts = _by_case(found["fp8"], "products_us", ONE_LAUNCH) if "fp8" in found else {}
    for n, goal in PARTS_GOALS.items():
        of_n = {case: row for case, row in parts.items() if case.endswith(f"_{n}-parts")}
        columns[f"FP8 products in {n} parts over one launch"] = {_shape(case): _over(row) for case, row in of_n.items()}
        verdicts.append(_reached(f"products in {n} parts, at most {goal:g} of one launch", of_n, goal))
    shapes = dict.fromkeys(shape for cells in columns.values() for shape in cells)
    lines = [[f"`{shape}`", *(cells.get(shape, "–") for cells in columns.values())] for shape in shapes]
    sections.append(markdown(["1 rank", *columns], lines))
    sections.append("Goals reached:\n\n" + "\n".join(f"- {verdict}" for verdict in verdicts if verdict))
    return "\n\n".join(sections)


# ---- several ranks ---------------------------------------------------------------------------------------------------


def ranks(contents: Contents) -> str:
    """A paragraph for each file, then the model with what was measured beside it."""
    sections, head = [], [f"forward + backward, T {TOKENS} a rank, µs", "precision", "one GPU"]
    for size in RANKS:
        head += [f"{size} ranks, model", "measured"]
        for precision in PRECISIONS:
            if content := contents.get(f"ep-{size}gpu-{precision}"):
                sections.append(_of_ranks(content, precision, size))
    lines, verdicts = [], []
    for model in MODEL:
        line = [str(model), model.precision.upper(), f"{model.one_gpu:,}"]
        for size, (serial, ranges) in zip(RANKS, model.steps, strict=True):
            row = _measured(contents, model, size)
            line += [f"{serial:,} / {ranges:,}", f"{row.value:,.0f} ({_over(row)})" if row else "–"]
            if row and (measured := _times(row)):
                verdicts.append(_judged(model, size, measured, serial, ranges))
        lines.append(line)
    sections.append(markdown(head, lines))
    if verdicts:
        sections.append(
            "Beside the model, in times of one GPU:\n\n" + "\n".join(f"- {verdict}" for verdict in verdicts)
        )
    return "\n\n".join(sections)


def _measured(contents: Contents, model: Predicted, size: int) -> Row | None:
    content = contents.get(f"ep-{size}gpu-{model.precision}")
    steps, case = _by_case(content, "fwd_bwd_us") if content else {}, model.case(size)
    of_case = [row for found, row in steps.items() if found == case or found.startswith(f"{case}_")]
    return next((row for row in of_case if not _remote(row.case)), None)


def _judged(model: Predicted, size: int, measured: float, serial: int, ranges: int) -> str:
    low, high = ranges / model.one_gpu, serial / model.one_gpu
    if measured > high:
        verdict = "refuted, longer than without any overlap"
    else:
        verdict = "confirmed" if measured >= low else "confirmed, less than with ranges"
    what = f"{model.name} in {model.precision.upper()} over {size} ranks"
    return f"{what} takes {measured:.2f}, where the model has {low:.2f} to {high:.2f}: {verdict}"


def _of_ranks(content: dict[str, Any], precision: str, size: int) -> str:
    """Where tokens choose evenly, and where a share of their choices was chosen."""
    every, hosts = _by_case(content, "fwd_bwd_us"), list(_by_case(content, "host_us").values())
    sentences = []
    for share in dict.fromkeys(map(_remote, every)):
        steps = {case: row for case, row in every.items() if _remote(case) == share}
        text = f"With a share of {share} of the choices elsewhere a" if share else "A"
        text += f" step takes {_range(filter(None, map(_times, steps.values())), '.2f')} times as long as that"
        goal = _reached(f"at most {RANKS_GOAL:g}", steps, RANKS_GOAL)
        sentences.append(f"{text} of one GPU with the same load. Goal reached: {goal}")
    if by_hand := [row.ratio for row in _by_case(content, "fwd_bwd_us", BY_HAND).values() if row.ratio]:
        sentences.append(f"The BF16 layer written by hand takes {_range(by_hand, '.2f')} times as long as ours")
    if hosts:
        text = f"The host needs {_range([row.value / 1e3 for row in hosts], '.1f')} ms for a step"
        more = [m for row in hosts if (m := _more(row)) is not None]
        sentences.append(
            f"{text}, {_range([m / 1e3 for m in more], '.1f')} ms beyond the plain layer" if more else text
        )
    return f"**{precision.upper()} over {size} GPUs**, {origin(content)}. {'. '.join(sentences)}."


# ---- cells -----------------------------------------------------------------------------------------------------------


def _by_case(content: dict[str, Any], metric: str, peer: str = ONE_GPU) -> dict[str, Row]:
    rows = [Row(**row) for row in content["rows"]]
    return {row.case: row for row in rows if (row.metric, row.peer) == (metric, peer)}


def _remote(case: str) -> str:
    """The share of choices whose experts other ranks hold, where it was chosen."""
    found = re.search(r"_remote([\d.]+)", case)
    return found[1] if found else ""


def _shape(case: str) -> str:
    return re.sub(r"_(R\d+.*|\d+-parts)$", "", case)


def _over(row: Row | None) -> str:
    over = row and _times(row)
    return f"{over:.3f}" if over else "–"


def _times(row: Row) -> float | None:
    """How many times as long as its peer, of pairs where there were any. A ratio in a file has six digits."""
    return round(1 / row.ratio, 4) if row.ratio else None


def _more(row: Row | None) -> float | None:
    return row.value - row.peer_value if row and row.peer_value is not None else None


def _range(values: Iterable[float], form: str) -> str:
    ends = [format(end(found), form) for found in [list(values)] if found for end in (min, max)]
    return " to ".join(dict.fromkeys(ends)) or "–"


def _reached(what: str, rows: Mapping[str, Row], goal: float) -> str:
    over = {case: times for case, row in rows.items() if (times := _times(row))}
    return _counted(what, {case: f"{ratio:.3f}" for case, ratio in over.items() if ratio > goal}, len(over))


def _within(what: str, beyond: Mapping[str, float]) -> str:
    missed = {case: f"{more:+.0f}" for case, more in beyond.items() if more > HOST_GOAL_US}
    return _counted(what, missed, len(beyond))


def _counted(what: str, missed: Mapping[str, str], measured: int) -> str:
    if not measured:
        return ""
    text = f"{what}, in {measured - len(missed)} of {measured} cases"
    named = ", ".join(f"`{_shape(case)}` ({value})" for case, value in missed.items())
    return f"{text}, not at {named}" if missed else text
