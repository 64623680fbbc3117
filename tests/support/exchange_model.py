"""A model of the exchange between GPUs that read and write each other's memory, small enough to try every interleaving.

What each of R ranks does in epoch e = 1, 2, ..., through one of two banks b of each rank's block:

    room    for each peer p: p.done[me] = e - 1                                               (release)
            for each peer p: wait until done[p] >= the last epoch of bank b                   (acquire)
    put     pull: write my rows into my bank; push: write rows into my slot of each peer's bank
            for each peer p: p.written[me] = e                                                (release)
    get     for each peer p: wait until written[p] >= e                                       (acquire)
            pull: read the rows in p's bank; push: read p's slot of my bank

A *post* is an exchange of three epochs e + 1, e + 2, e + 3 for which nobody is asked for room: choices, x and parts are
each written to all peers and told, and awaited by who reads them. Posts follow posts only.

In a pull rows lie where a push of rank 0 would write. Flags hold epochs and are never reset. Writes and reads of data
take time: a write leaves its place torn until it ends, a read must find the same epoch when it begins and when it ends.
:func:`explore` runs every interleaving of the steps of all ranks; a state is how far each has come and what memory
holds.
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

    exchanges: tuple[tuple[str, int], ...] = (("pull", 0), ("push", 1))
    """Way and bank of each exchange, over and over."""
    room: bool = True
    flag_after_data: bool = True
    slack: int = 0
    """Epochs by which a flag may be behind what is waited for."""


RIGHT = Rules()


def program(rank: int, ranks: int, epochs: int, rules: Rules) -> list[Step]:
    peers = [p for p in range(ranks) if p != rank]
    steps: list[Step] = []
    last, before = {0: 0, 1: 0}, 0
    for number in range(epochs):
        way, bank = rules.exchanges[number % len(rules.exchanges)]
        if rules.room and way != "post":
            steps += [Step("flag", ("done", p, 0, rank), before) for p in peers]
            steps += [Step("wait", ("done", rank, 0, p), last[bank]) for p in peers]
        epoch = before + 1
        before = last[bank] = before + (3 if way == "post" else 1)
        if way == "post":
            steps += _posted(rank, peers, bank, epoch, rules)
            continue
        places = [("bank", rank, bank, 0)] if way == "pull" else [("bank", p, bank, rank) for p in peers]
        put = [Step("write", place, epoch) for place in places]
        flags = [Step("flag", ("written", p, 0, rank), epoch) for p in peers]
        steps += put + flags if rules.flag_after_data else flags + put
        steps += [Step("wait", ("written", rank, 0, p), epoch) for p in peers]
        places = [("bank", p, bank, 0) if way == "pull" else ("bank", rank, bank, p) for p in peers]
        steps += [Step("read", place, epoch) for place in places]
    return steps


def _posted(rank: int, peers: list[int], bank: int, first: int, rules: Rules) -> list[Step]:
    def put(what: str, epoch: int) -> list[Step]:
        data = [Step("write", (what, p, bank, rank), epoch) for p in peers]
        flags = [Step("flag", ("written", p, 0, rank), epoch) for p in peers]
        return data + flags if rules.flag_after_data else flags + data

    def get(what: str, epoch: int) -> list[Step]:
        waits = [Step("wait", ("written", rank, 0, p), epoch) for p in peers]
        return waits + [Step("read", (what, rank, bank, p), epoch) for p in peers]

    choices, x, parts = ("choices", first), ("x", first + 1), ("parts", first + 2)
    return [*put(*choices), *put(*x), *get(*choices), *get(*x), *put(*parts), *get(*parts)]


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
