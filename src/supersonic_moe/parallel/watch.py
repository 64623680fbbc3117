"""Who waits for whom: a limit on every wait for another rank, and an error that names the rank and what it was doing.

A collective that never ends says nothing about its cause. So every rank reports what it is doing to the store of
``torch.distributed``, from a thread of its own, a few times in each time limit (at most once a second):

    [17, [12, "forward dispatch", true]]            report 17: still in the forward dispatch of its call 12

A rank whose wait fails or exceeds the limit reads the reports of the others twice. Who is not in the same phase of the
same call is named; who has not reported in between is called dead. A wait on the CPU ends in an exception at once. Work
on a CUDA stream is awaited by nobody, so the thread looks after it: it logs the sentence, aborts the process group
(which ends a collective that hangs), and the next call raises. Of flags in GPU memory the GPU itself keeps the limit,
and leaves the reason where the thread finds it.

A rank that leaves, that cannot go on because of an error of its own, or that has waited in vain, says so in the store.
Who waits for it, the late one that comes at last included, is told at the next report, and does not wait for the limit.
So is who waits in a call that another rank has refused, because of its arguments. That ends nothing by itself: where
all ranks have refused a call, nobody waits in it, and the next one works.
"""

from __future__ import annotations

import atexit
import itertools
import json
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from supersonic_moe.kernels.sm90.exchange_flags import OTHER_CALL, STOPPED, ExchangeFlags, Failure
from supersonic_moe.private_api import END_OF_RECOMPUTATION

log = logging.getLogger("supersonic_moe")

BEATS_IN_A_LIMIT = 10
LONGEST_BEAT_S = 1.0
LONGEST_END_S = 5.0  # a thread that asks a store whose host is gone may take minutes
BEATS_OF_SILENCE = 3
"""A rank that has not reported for so long is dead, or its host is too busy to run a thread."""

PHASES = ("forward dispatch", "forward combine", "backward dispatch", "backward combine")
_FAILED = " has failed: "
_REFUSED = " has refused this call: "
_GONE = "gone"
_REFUSING = "refused"
_ROW_BITS, _CALL_BITS = 20, 9


class ExpertParallelError(RuntimeError):
    """Ranks of a group do not work together: one is late, dead, or calls something else."""


class Activity(NamedTuple):
    """What a rank does."""

    call: int
    phase: str
    inside: bool
    """Whether it is still in that phase."""

    def __str__(self) -> str:
        if not self.call:
            return "before its first call"
        return f"{'in' if self.inside else 'past'} the {self.phase} of call {self.call}"


class _Started(NamedTuple):
    """A collective on a CUDA stream."""

    end: Any
    """A ``torch.cuda.Event``."""
    at: float
    activity: Activity


def carried(phase: str, row_bytes: int, call: int) -> int:
    """What an exchange carries, in 31 bits: the phase, and last bits of the call's number and of the bytes of a row."""
    return (PHASES.index(phase) << _CALL_BITS | call % (1 << _CALL_BITS)) << _ROW_BITS | row_bytes % (1 << _ROW_BITS)


def _description(carried: int) -> str:
    phase = PHASES[carried >> (_ROW_BITS + _CALL_BITS) & 3]
    return f"the {phase} with rows of {carried % (1 << _ROW_BITS)} bytes"


def _call_of(carried: int, near: int) -> int:
    """The number of a call, of which only the last bits are known, and that it is ``near`` another one."""
    half = 1 << (_CALL_BITS - 1)
    return near + ((carried >> _ROW_BITS) - near + half) % (2 * half) - half


class Watch:
    """The waits of one rank of one group.

    Args:
        what: name and size of the group, as errors give it.
        rank, size: of this process in the group.
        store: a ``torch.distributed.Store`` of this group alone, where ranks report; None: nothing is known of others.
        limit_s: seconds that a wait may last.
        kind: what the user made, with this limit.
    """

    def __init__(self, what: str, rank: int, size: int, store: Any, limit_s: float, kind: str) -> None:
        self.what, self.rank, self.size, self.limit_s, self.kind = what, rank, size, limit_s, kind
        self.activity = Activity(0, "", False)
        self.failure: str | None = None
        """Why no further call can work."""
        self._reports, self._started = Reports(store, rank), deque[_Started]()
        self._group: dist.ProcessGroup | None = None
        self.flags: ExchangeFlags | None = None
        """On the GPU, of ranks that reach each other's memory."""
        self._everywhere = False
        """Whether an error that is raised now is raised on every rank."""
        self.beat_s = min(LONGEST_BEAT_S, limit_s / BEATS_IN_A_LIMIT)
        stop = threading.Event()
        arguments = (weakref.ref(self), stop, self.beat_s, self._reports)
        thread = threading.Thread(target=_look_after, args=arguments, daemon=True)
        # at exit, too, while threads may still end
        self._end = weakref.finalize(self, _end, stop, thread, self._reports)
        atexit.register(self._reports.is_final)
        thread.start()

    def close(self) -> None:
        """No more reports; the last one says that this rank is gone on purpose. May be called twice."""
        if self._end.alive:
            if done := self._is_done():
                self._reports.is_final()
            self._end()
            if not done:
                self._reports.tell("left", "")
            self.failure = (
                self.failure or f"{self.what} is closed; make a new {self.kind}, of a new group if a rank has failed."
            )

    def _is_done(self) -> bool:
        """Whether the device has done all that others may wait for, now or in a few seconds."""
        end = time.monotonic() + LONGEST_END_S
        try:
            pending = [started.end for started in self._started]
            if self.flags is not None:
                pending.append(self.flags.mark())
            while not all(event.query() for event in pending):
                if time.monotonic() > end:
                    return False
                time.sleep(0.01)
        except RuntimeError:  # of the device: nothing more will be done
            pass
        return True

    # ---- waiting -----------------------------------------------------------------------------------------------------

    def enter(self, call: int, phase: str) -> None:
        """Raises ExpertParallelError if an earlier wait has failed."""
        self.check()
        if self._started and not torch.cuda.is_current_stream_capturing():
            while self._started and self._started[0].end.query():
                self._started.popleft()
        self.activity = Activity(call, phase, True)

    def check(self) -> None:
        if self.failure is not None:
            raise ExpertParallelError(self.failure)

    def finish(self) -> None:
        """Wait for the device; raises as ``enter`` does."""
        try:
            for started in list(self._started):
                started.end.synchronize()
            if self.flags is not None:
                self.flags.synchronize()
        except RuntimeError as error:
            self.explain(error)
            raise
        self.check()

    def wait(self, work: Any, group: dist.ProcessGroup, device: torch.device) -> None:
        """The end of a collective: for the host on a CPU, for the stream on a GPU."""
        if device.type != "cuda":
            self._wait_on_host(work)
            return
        work.wait()
        if not torch.cuda.is_current_stream_capturing():
            end: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record(torch.cuda.current_stream(device))
            self._group = group
            self._started.append(_Started(end, time.monotonic(), self.activity))

    def _wait_on_host(self, work: Any) -> None:
        """Looks now and then whether a rank has gone; what it sent before may still be under way, so it looks twice."""
        end, gone = time.monotonic() + self.limit_s, False
        while True:
            try:
                work.wait(timedelta(seconds=min(2 * self.beat_s, max(0.001, end - time.monotonic()))))
            except RuntimeError:
                if gone or work.is_completed() or time.monotonic() >= end:
                    raise
                gone = self._reports.gone() is not None or self._reports.refused(self.activity.call) is not None
            else:
                return

    def leave(self) -> None:
        self.activity = self.activity._replace(inside=False)

    def failed(self, error: Exception | None, seconds: float) -> ExpertParallelError:
        """The error of a wait that ended in ``error``, or did not end, after so many ``seconds``."""
        return ExpertParallelError(self._fail(self.activity, error, seconds))

    def explain(self, error: RuntimeError) -> None:
        """Raises ExpertParallelError if a wait of the GPU has failed, which any call may then show as a CUDA error."""
        if self._look():
            raise ExpertParallelError(self.failure) from error

    def _look(self) -> bool:
        """Whether no further call can work."""
        if self.failure is None and self.flags is not None and (found := self.flags.failure()) is not None:
            mine = Activity(found.call, PHASES[found.phase], True)
            facts = self._of_device(mine, found)
            log.error(facts)  # at once: what runs into a CUDA error may end the process
            self._failed(mine, f"{facts} {self._about_peer(mine, found)}")
        return self.failure is not None

    def tell(self, error: Exception) -> None:
        """No further call can work because of an error of this rank alone: let the others know, who wait."""
        self._failed(self.activity, str(error))
        self._reports.go()

    def refuse(self, call: int, error: Exception) -> None:
        """This rank leaves out ``call`` because of an ``error`` of its arguments."""
        self._reports.refuse(call, f"{type(error).__name__}: {error}")

    @contextmanager
    def telling(self, call: int) -> Iterator[None]:
        """Tells the others if this rank cannot go on, for want of memory for instance. ValueError, TypeError and
        NotImplementedError are of arguments, and the rank that raises them refuses this ``call`` alone: where all ranks
        do, all may go on.
        """
        self._everywhere = False
        try:
            yield
        except (ExpertParallelError, END_OF_RECOMPUTATION):
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            if not self._everywhere:
                self.refuse(call, error)
            raise
        except Exception as error:
            self.tell(error)
            raise

    @contextmanager
    def raising_everywhere(self) -> Iterator[None]:
        """Nobody needs to be told of what is raised inside: the other ranks have found it out, too."""
        self._everywhere = True
        yield
        self._everywhere = False

    def _fail(self, activity: Activity, error: Exception | None, seconds: float) -> str:
        late = seconds >= 0.99 * self.limit_s
        sentence = self._failed(activity, self._sentence(activity, error, seconds, late), late)
        self._reports.go()
        return sentence

    def _failed(self, activity: Activity, sentence: str, waited: bool = False) -> str:
        """``waited``: until the limit."""
        self.failure = sentence
        self._reports.tell("failed", json.dumps((activity, sentence, waited)))
        return sentence

    # ---- what ranks know of each other -------------------------------------------------------------------------------

    def _sentence(self, mine: Activity, error: Exception | None, seconds: float, late: bool) -> str:
        what = f"waited {seconds:.3g} s" if late else f"failed after {seconds:.3g} s"
        others = self._about_all(mine, [rank for rank in range(self.size) if rank != self.rank], late)
        others = others or "All ranks are there now: one came late, or the network between them is slow or broken."
        sentences = [f"{self.what}: rank {self.rank} {what} {mine}.", others]
        if late:
            sentences.append(self._limit())
        elif error is not None and _FAILED not in others and _REFUSED not in others:
            sentences.append(f"torch says: {str(error).splitlines()[0]}")
        return " ".join(sentences)

    def _limit(self) -> str:
        return f"{self.kind}(timeout_s=...) sets the limit."

    def _of_device(self, mine: Activity, found: Failure) -> str:
        start = f"{self.what}: rank {self.rank}"
        if found.why == OTHER_CALL:
            other = f"rank {found.peer} is in call {_call_of(found.seen, found.call)}, {_description(found.seen)}"
            return f"{start} is in call {found.call}, {_description(found.wanted)}; {other}."
        if found.why == STOPPED:
            return f"{start} stopped {mine}, because rank {found.peer} cannot go on."
        waited = f"waited {self.limit_s:.3g} s {mine} for rank {found.peer}"
        return f"{start} {waited} (exchange {found.wanted} expected, {found.seen} seen)."

    def _refusal(self, call: int) -> str:
        """A sentence about a rank that has refused ``call``, or nothing."""
        if (told := self._reports.refused(call)) is None:
            return ""
        return f"Rank {told[0]}{_REFUSED}{told[1]}"

    def ahead(self, calls: tuple[int, int]) -> str:
        """Why ranks may be in these different calls, or nothing."""
        told = self._reports.refused(min(calls)) if calls[0] != calls[1] else None
        return "" if told is None else f"Rank {told[0]} has refused call {min(calls)}: {told[1]}"

    def _about_peer(self, mine: Activity, found: Failure) -> str:
        if found.why == OTHER_CALL:
            calls = found.call, _call_of(found.seen, found.call)
            return self.ahead(calls) or "Run the same layers and steps on every rank."
        if found.why == STOPPED:
            return self._refusal(mine.call) or self._failure_of(found.peer)
        about = self._about_all(mine, [found.peer], late=True) or "Its host has come as far: its GPU is busy, or stuck."
        return f"{about} {self._limit()}"

    def _failure_of(self, rank: int) -> str:
        """Why ``rank`` has told others to stop. It may still be looking for its own reason."""
        end = time.monotonic() + 2 * BEATS_OF_SILENCE * self.beat_s
        while (told := self._reports.told("failed", rank)) is None and time.monotonic() < end:
            time.sleep(self.beat_s / 4)
        if told is None:
            return "It has closed its ExpertParallel, its process has ended, or its log says why."
        return f"Rank {rank}{_FAILED}{json.loads(told)[1]}"

    def _about_all(self, mine: Activity, ranks: Sequence[int], late: bool) -> str:
        """Sentences about those of ``ranks`` that do not come. ``late``: this one has waited until the limit."""
        if refusal := self._refusal(mine.call):
            return refusal
        before = {rank: self._reports.told("alive", rank) for rank in ranks}
        time.sleep(BEATS_OF_SILENCE * self.beat_s)
        if self._reports.store is None:
            return "Nothing is known of the other ranks: the store of torch.distributed is gone."
        found = [s for rank in ranks if (s := self._about(rank, before[rank], mine, late))]
        failures = [s for s in found if _FAILED in s][1:]  # one of them says it all
        return " ".join(s for s in found if s not in failures)

    def _about(self, rank: int, before: str | None, mine: Activity, late: bool) -> str:
        """Why it is this rank that does not come; empty if it has come. It may have given up before this one came."""
        if (told := self._reports.told("failed", rank)) is not None:
            activity, failure, waited = json.loads(told)
            came = Activity(*activity) == mine and (late or not waited)
            return "" if came else f"Rank {rank}{_FAILED}{failure}"
        if self._reports.told("left", rank) is not None:
            return f"Rank {rank} has closed its ExpertParallel, or its process has ended."
        now = self._reports.told("alive", rank)
        if now is None:
            return f"Rank {rank} has never reported."
        activity = Activity(*json.loads(now)[1])
        if now == before:
            return f"Rank {rank} no longer reports, last seen {activity}: it crashed, was killed, or lost its network."
        if activity == mine:
            return ""
        return f"Rank {rank} is {activity}: it is slow, or calls something else (other layers, other steps)."

    # ---- the thread --------------------------------------------------------------------------------------------------

    def beat(self, gone: int | None) -> None:
        """``gone``: a rank that serves no further wait."""
        if self.flags is not None and self.failure is None:
            missing = gone
            if missing is None and (told := self._reports.refused(self.flags.waits_in())) is not None:
                missing = told[0]
            if missing is not None:
                self.flags.stop(missing)
            if self._look():
                log.error(self.failure)
        for started in list(self._started):
            # An event is asked only when it is late: asking while another thread captures a CUDA graph would break it.
            waits, limit_s = time.monotonic() - started.at, self.limit_s
            if gone is not None or self._reports.refused(started.activity.call) is not None:
                limit_s = min(self.limit_s, BEATS_OF_SILENCE * self.beat_s)
            if waits < limit_s:
                return
            if not started.end.query():
                self._abort(started, waits)
                return

    def _abort(self, started: _Started, waits: float) -> None:
        self._started.clear()
        log.error(self._fail(started.activity, None, waits))
        abort = getattr(self._group, "abort", None)
        if abort is not None:
            abort()


class Reports:
    """What ranks tell each other through a ``torch.distributed.Store``, or None."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self.final = False
        """Whether the last report says that this rank serves no further wait."""

    def is_final(self) -> None:
        self.final = True

    def tell(self, kind: str, text: str) -> None:
        self._ask(lambda store: store.set(f"{kind}/{self.rank}", text))

    def told(self, kind: str, rank: int) -> str | None:
        """What a rank has told, if anything; never waits for it."""
        return self._read(f"{kind}/{rank}")

    def go(self) -> None:
        """This rank serves no further wait."""
        self._ask(lambda store: store.set(_GONE, str(self.rank)))

    def refuse(self, call: int, why: str) -> None:
        """This rank leaves out ``call``."""
        self._ask(lambda store: store.set(f"{_REFUSING}/{call}", json.dumps((self.rank, why))))

    def refused(self, call: int) -> tuple[int, str] | None:
        """(the last rank that has refused ``call``, why), if any has; 0 is no call."""
        found = self._read(f"{_REFUSING}/{call}") if call else None
        return None if found is None else tuple(json.loads(found))

    def leave(self) -> None:
        if self.final:
            self.tell("left", "")
            self.go()

    def gone(self) -> int | None:
        """The last other rank that serves no further wait."""
        found = self._read(_GONE)
        return None if found is None or int(found) == self.rank else int(found)

    def _read(self, key: str) -> str | None:
        found: str | None = self._ask(lambda store: store.get(key).decode() if store.check([key]) else None)
        return found

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        if self.store is None:
            return None
        try:
            return question(self.store)
        except RuntimeError:  # the process that holds the store is gone
            self.store = None
            return None


def _look_after(watch: weakref.ref[Watch], stop: threading.Event, beat_s: float, reports: Reports) -> None:
    for number in itertools.count():
        gone = reports.gone()
        found = watch()  # alive no longer than this takes, or its end would come here
        if found is None:
            break
        found.beat(gone)
        activity = found.activity
        del found
        reports.tell("alive", json.dumps((number, activity)))
        if stop.wait(beat_s):
            break
    reports.leave()


def _end(stop: threading.Event, thread: threading.Thread, reports: Reports) -> None:
    atexit.unregister(reports.is_final)
    stop.set()
    if thread is not threading.current_thread():
        thread.join(LONGEST_END_S)
