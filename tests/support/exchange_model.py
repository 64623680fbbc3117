"""A model of the exchange between GPUs that write into each other's memory, small enough to try every interleaving.

What each of R ranks does in epoch e = 1, 2, ... (a forward or a backward of one call), with two banks b = e mod 2:

    send    for each peer p: write my rows into p.rows[b][me];  then p.arrived[me] = e        (release)
    take    for each peer p: wait until arrived[p] >= e;  read rows[b][p]                     (acquire)
    back    for each peer p: write parts into p.parts[me];  then p.returned[me] = e           (release)
    sum     for each peer p: wait until returned[p] >= e;  read parts[p]                      (acquire)
    late    read rows[b] once more: weight gradients, which hide the way back

Flags hold epochs and are never reset. Writes and reads of data take time: a write leaves its place torn until it ends,
a read must find the same epoch when it begins and when it ends. :func:`explore` runs every interleaving of the steps of
all ranks; a state is how far each has come and what memory holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Place = tuple[str, int, int, int]
"""(what, owner, bank, writer)"""
TORN = -1


class Step(NamedTuple):
    kind: str
    """write, flag, wait or read."""
    place: Place
    epoch: int


class Rules(NamedTuple):
    """How the exchange is done; the defaults are right."""

    banks: int = 2
    late_reads: bool = True
    flag_after_data: bool = True
    slack: int = 0
    """Epochs by which a flag may be behind what is waited for."""


RIGHT = Rules()


def program(rank: int, ranks: int, epochs: int, rules: Rules) -> list[Step]:
    peers = [p for p in range(ranks) if p != rank]
    steps: list[Step] = []

    def put(what: str, flag: str, bank: int, epoch: int) -> None:
        for p in peers:
            pair = [Step("write", (what, p, bank, rank), epoch), Step("flag", (flag, p, 0, rank), epoch)]
            steps.extend(pair if rules.flag_after_data else reversed(pair))

    def get(what: str, flag: str, bank: int, epoch: int) -> None:
        for p in peers:
            steps.append(Step("wait", (flag, rank, 0, p), epoch))
            steps.append(Step("read", (what, rank, bank, p), epoch))

    for epoch in range(1, epochs + 1):
        bank = epoch % rules.banks
        put("rows", "arrived", bank, epoch)
        get("rows", "arrived", bank, epoch)
        put("parts", "returned", 0, epoch)
        get("parts", "returned", 0, epoch)
        if rules.late_reads:
            steps += [Step("read", ("rows", rank, bank, p), epoch) for p in peers]
    return steps


class State(NamedTuple):
    at: tuple[int, ...]
    """Steps done by each rank."""
    busy: tuple[bool, ...]
    """Whether a rank is inside a write or a read."""
    memory: tuple[tuple[Place, int], ...]


def explore(ranks: int, epochs: int, rules: Rules = RIGHT, stopped: dict[int, int] | None = None) -> Outcome:
    """Every interleaving. ``stopped``: a rank dies after so many steps."""
    programs = [program(rank, ranks, epochs, rules) for rank in range(ranks)]
    ends = [min(len(steps), (stopped or {}).get(rank, len(steps))) for rank, steps in enumerate(programs)]
    first = State((0,) * ranks, (False,) * ranks, ())
    seen, todo, outcome = {first}, [first], Outcome(0, set(), set())
    while todo:
        state = todo.pop()
        moves = list(_moves(state, programs, ends, rules, outcome.wrong))
        waiting = [rank for rank in range(ranks) if state.at[rank] < len(programs[rank])]
        if not moves and waiting:
            alive = [rank for rank in waiting if state.at[rank] < ends[rank]]
            outcome.stuck.add(tuple((rank, programs[rank][state.at[rank]].place[3]) for rank in alive))
        for move in moves:
            if move not in seen:
                seen.add(move)
                todo.append(move)
    return outcome._replace(states=len(seen))


class Outcome(NamedTuple):
    states: int
    wrong: set[Step]
    """Reads that found something else than what they waited for."""
    stuck: set[tuple[tuple[int, int], ...]]
    """Ends in which nobody can go on: who waits, and for whom."""


def _moves(
    state: State, programs: list[list[Step]], ends: list[int], rules: Rules, wrong: set[Step]
) -> Iterator[State]:
    memory = dict(state.memory)
    for rank, (at, busy) in enumerate(zip(state.at, state.busy, strict=True)):
        if at == ends[rank]:
            continue
        step, after, inside = programs[rank][at], dict(memory), False
        if step.kind == "wait":
            if memory.get(step.place, 0) < step.epoch - rules.slack:
                continue
        elif step.kind == "flag":
            after[step.place] = step.epoch
        elif step.kind == "write":
            inside = not busy
            after[step.place] = TORN if inside else step.epoch
        elif step.kind == "read":
            inside = not busy
            if memory.get(step.place, 0) != step.epoch:
                wrong.add(step)
        steps = tuple(n + (r == rank and not inside) for r, n in enumerate(state.at))
        now_busy = tuple(inside if r == rank else b for r, b in enumerate(state.busy))
        yield State(steps, now_busy, tuple(sorted(after.items())))
