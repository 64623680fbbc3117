"""What a call of ``MegaMoE`` costs, for docs/expert-parallel.md: published times, ours at one rank, a model of more.

    model of R ranks = ours at one rank with as many rows + travel + LAUNCHES_US

Travel is ``transport="gather"`` by copies (``parallel/traffic.py``) at ``COPIES`` bytes a second, not hidden behind
products. Two ranks have a table of what was measured (``on_two``). Published are the whole fused call and two ways of
DeepEP around DeepGEMM's products on 8 H200s (DeepGEMM, pull request 360): version 2, and the low-latency kernels of
version 1, which were not run from 4096 tokens on. What was not measured is a dash.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from supersonic_moe.bench.markdown import markdown, origin
from supersonic_moe.bench.mega_cases import DEEP_GEMM, DIRECT, SHAPES, TOKENS, MegaShape, at_most_us, must
from supersonic_moe.bench.report import Row, short
from supersonic_moe.parallel.traffic import Load

NAME, ON_TWO = "mega-world1", "mega-2gpu"
COPIES = 346e9  # bytes a second of copy engines between two H200s, the slower of two measurements
LAUNCHES_US = 100  # dispatch and combine of the composed form: 35 to 40 launches of 2 to 4 µs
RANKS = (4, 8)


class Published(NamedTuple):
    """µs at ``TOKENS`` a rank."""

    fused: tuple[int, ...]
    low_latency: tuple[int | None, ...]
    deep_ep: tuple[int, ...]


_SKIPPED = (None, None)
PUBLISHED = {
    "flash": Published(
        (241, 251, 327, 347, 593, 1818, 3605),
        (269, 296, 348, 474, 721, *_SKIPPED),
        (333, 351, 399, 477, 688, 2141, 4059),
    ),
    "pro": Published(
        (748, 821, 1040, 1104, 1702, 4989, 10123),
        (813, 908, 1018, 1187, 1658, *_SKIPPED),
        (884, 980, 1065, 1171, 1626, 4628, 8926),
    ),
    "mimo-2.5": Published(
        (245, 254, 332, 482, 742, 2323, 4795),
        (274, 301, 391, 555, 899, *_SKIPPED),
        (340, 367, 430, 564, 873, 2766, 5331),
    ),
    "mimo-2.5-pro": Published(
        (476, 509, 660, 700, 1260, 3715, 7773),
        (526, 575, 689, 875, 1388, *_SKIPPED),
        (588, 635, 731, 864, 1335, 4113, 7996),
    ),
}
NOT_RUN = f"""\
Not measured with the kernels of this commit yet. On an H200, with `sgl-deep-gemm` on the path:

```bash
supersonic-moe bench mega --json {NAME}.json --png {NAME}.png
supersonic-moe bench mega --peers none --min-ms 0 --timeline {NAME}-timeline.png
```"""


def travel_us(shape: MegaShape, tokens: int, ranks: int) -> float:
    """There and back, with as many experts on each rank."""
    sent = Load(tokens, shape.hidden, ranks * shape.local, shape.rule.top_k, ranks, "fp8", places=tokens).sent
    return (sent.dispatch + sent.combine) / COPIES * 1e6


def page(content: dict[str, Any] | None, timeline: str | None) -> str:
    """Of a results file, if there is one, and of a figure by its place as docs/ sees it."""
    rows = [Row(**row) for row in content["rows"]] if content else []
    head = ["8 H200s, published, and ours", "tokens a rank", "fused", "DeepEP, low latency", "DeepEP V2"]
    head += ["ours, 1 rank", "of floor"]
    head += ["vs DeepGEMM, 1 rank", *(f"{ranks} ranks (model)" for ranks in RANKS)]
    lines = [_line(rows, shape, tokens, at) for shape in SHAPES.values() for at, tokens in enumerate(TOKENS)]
    sections = [f"{origin(content)}." if content else NOT_RUN, markdown(head, lines)]
    if rows:
        sections += [_goals(rows), _against_published(rows)]
    if errors := _errors(rows):
        sections.append(markdown(["numbers of one sign", "calc_diff", "DeepGEMM's", "worst row", "DeepGEMM's"], errors))
    if timeline is not None:
        sections.append(f"![kernels of a call]({timeline})")
    return "\n\n".join(filter(None, sections))


def on_two(content: dict[str, Any] | None) -> str:
    """Of a results file of two ranks; nothing without one. Each row is held against its bars by the better of ours."""
    rows = [Row(**row) for row in content["rows"]] if content else []
    lines, met, ahead, beside = [], 0, 0, 0
    for name, tokens in ((f"{name}-R2", tokens) for name in SHAPES for tokens in TOKENS):
        case, at_most = f"{name}_T{tokens}_uniform", at_most_us(name, tokens)
        ours, of_floor = (_found(rows, case, metric) for metric in ("replay_us", "of_floor"))
        if ours is None or of_floor is None or at_most is None:
            continue
        direct, peer = (_peer_value(rows, case, who) for who in (DIRECT, DEEP_GEMM))
        best = min(ours.value, direct or ours.value)
        met += best <= at_most
        beside += peer is not None
        ahead += peer is not None and peer / best >= must(tokens, 2)
        cells = [f"`{name}`", str(tokens), short(ours.value), short(direct) if direct else "–", str(at_most)]
        cells += [f"{of_floor.value:.0%}", short(peer) if peer else "–", f"{peer / best:.2f}×" if peer else "–"]
        lines.append(cells)
    if content is None or not lines:
        return ""
    head = ["2 ranks, µs", "tokens a rank", "`MegaMoE`", "`direct=True`", "at most", "of floor", "DeepGEMM", "ratio"]
    text = f"The better of both ways takes no longer than it may in {met} of {len(lines)} rows"
    if beside:
        steps = f"{must(256, 2):.2f}× up to 256 tokens, {must(512, 2):.2f}× up to 512 and {must(513, 2):.2f}× beyond"
        text += f". Beside DeepGEMM on two ranks, {steps}, it reaches the goal in {ahead} of {beside}"
    return "\n\n".join([f"Two GPUs, {origin(content)}.", markdown(head, lines), f"{text}."])


def _peer_value(rows: list[Row], case: str, peer: str) -> float | None:
    found = _found(rows, case, "replay_us", peer)
    return None if found is None else found.peer_value


def _line(rows: list[Row], shape: MegaShape, tokens: int, at: int) -> list[str]:
    case = f"{shape.name}_T{tokens}_uniform"
    ours, of_floor = (_found(rows, case, metric) for metric in ("replay_us", "of_floor"))
    beside = _found(rows, case, "replay_us", DEEP_GEMM)
    cells = [f"`{shape.name}`", str(tokens), *(str(us[at] or "–") for us in PUBLISHED[shape.name])]
    cells.append(short(ours.value) if ours else "–")
    cells.append(f"{of_floor.value:.0%}" if of_floor else "–")
    cells.append(f"{beside.ratio:.2f}×" if beside and beside.ratio is not None else "–")
    for ranks in RANKS:
        more = travel_us(shape, tokens, ranks) + LAUNCHES_US
        cells.append(f"{ours.value + more:,.0f}" if ours else f"+ {more:,.0f}")
    return cells


def _goals(rows: list[Row]) -> str:
    """Where ours is not as many times faster than DeepGEMM's kernel as it has to be."""
    missed, measured, behind = [], 0, 0
    for name, tokens in ((name, tokens) for name in SHAPES for tokens in TOKENS):
        beside = _found(rows, f"{name}_T{tokens}_uniform", "replay_us", DEEP_GEMM)
        if beside and beside.ratio is not None:
            measured += 1
            behind += beside.ratio < 1
            if beside.ratio < must(tokens):
                missed.append(f"`{name}` at {tokens} ({beside.ratio:.2f}×)")
    if not measured:
        return ""
    steps = f"{must(256):.2f}× up to 256 tokens, {must(1024):.2f}× up to 1024 and {must(1025):.2f}× beyond"
    text = f"The goal beside DeepGEMM on one rank, {steps}, is reached in {measured - len(missed)} of {measured} rows"
    text = f"{text}, not by {'; '.join(missed)}." if missed else f"{text}."
    return f"{text} DeepGEMM's kernel takes less time than ours in {behind} of {measured}."


def _against_published(rows: list[Row]) -> str:
    """In how many rows the model of the most ranks takes longer than what was published, of DeepEP the faster way."""
    ranks, longer, measured = RANKS[-1], [0, 0], 0
    for shape, (at, tokens) in ((shape, place) for shape in SHAPES.values() for place in enumerate(TOKENS)):
        if ours := _found(rows, f"{shape.name}_T{tokens}_uniform", "replay_us"):
            model, measured = ours.value + travel_us(shape, tokens, ranks) + LAUNCHES_US, measured + 1
            told = PUBLISHED[shape.name]
            deep_ep = min(filter(None, (told.low_latency[at], told.deep_ep[at])))
            longer = [count + (model > us) for count, us in zip(longer, (told.fused[at], deep_ep), strict=True)]
    text = f"The model of {ranks} ranks takes longer than the published fused call in {longer[0]} of {measured} rows"
    return f"{text}, and longer than the faster way of DeepEP in {longer[1]}."


def _errors(rows: list[Row]) -> list[list[str]]:
    lines = []
    for case in dict.fromkeys(row.case for row in rows if "-positive" in row.case):
        cells = [f"`{case}`"]
        for metric in ("calc_diff", "worst_row"):
            ours, peer = _found(rows, case, metric), _found(rows, case, metric, DEEP_GEMM)
            cells += [
                short(ours.value) if ours else "–",
                short(peer.peer_value) if peer and peer.peer_value is not None else "–",
            ]
        lines.append(cells)
    return lines


def _found(rows: list[Row], case: str, metric: str, peer: str | None = None) -> Row | None:
    """A row of this case and metric, beside ``peer`` if there is to be one."""
    return next((r for r in rows if (r.case, r.metric) == (case, metric) and peer in (None, r.peer)), None)
