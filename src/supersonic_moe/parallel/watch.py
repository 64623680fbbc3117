"""Who waits for whom: a limit on every wait for another rank, and an error that names the rank and what it was doing.

A collective that never ends says nothing about its cause. So every rank reports what it is doing to the store of
``torch.distributed``, from a thread of its own, a few times in each time limit (at most once a second):

    [17, [12, "forward dispatch", true]]            report 17: still in the forward dispatch of its call 12

A rank whose wait fails or exceeds the limit reads the reports of the others twice. Who is not in the same phase of the
same call is named; who has not reported in between is called dead. A wait on the CPU ends in an exception at once. Work
on a CUDA stream is awaited by nobody, so the thread looks after it: it logs the sentence, aborts the process group
(which ends a collective that hangs), and the next call raises.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
import weakref
from collections import deque
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

log = logging.getLogger("supersonic_moe")

BEATS_IN_A_LIMIT = 10
LONGEST_BEAT_S = 1.0
LONGEST_END_S = 5.0  # a thread that asks a store whose host is gone may take minutes
BEATS_OF_SILENCE = 3
"""A rank that has not reported for so long is dead, or its host is too busy to run a thread."""

_FAILED = " has failed: "


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


class Watch:
    """The waits of one rank of one group.

    Args:
        what: name and size of the group, as errors give it.
        rank, size: of this process in the group.
        store: a ``torch.distributed.Store`` of this group alone, where ranks report; None: nothing is known of others.
        limit_s: seconds that a wait may last.
    """

    def __init__(self, what: str, rank: int, size: int, store: Any, limit_s: float) -> None:
        self.what, self.rank, self.size, self.limit_s = what, rank, size, limit_s
        self.activity = Activity(0, "", False)
        self.failure: str | None = None
        """Why no further call can work."""
        self._store, self._started = store, deque[_Started]()
        self._group: dist.ProcessGroup | None = None
        self.beat_s = min(LONGEST_BEAT_S, limit_s / BEATS_IN_A_LIMIT)
        stop = threading.Event()
        thread = threading.Thread(target=_look_after, args=(weakref.ref(self), stop, self.beat_s), daemon=True)
        self._end = weakref.finalize(self, _end, stop, thread)  # runs at exit, too, while threads may still end
        thread.start()

    def close(self) -> None:
        """No more reports; the last one says that this rank is gone on purpose. May be called twice."""
        if self._end.alive:
            self._end()
            self.failure = self.failure or f"{self.what} is closed; make a new ExpertParallel."
            self._tell("left", "closed")

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
        for started in list(self._started):
            started.end.synchronize()
        self.check()

    def wait(self, work: Any, group: dist.ProcessGroup, device: torch.device) -> None:
        """The end of a collective: for the host on a CPU, for the stream on a GPU."""
        if device.type != "cuda":
            work.wait(timedelta(seconds=self.limit_s))
            return
        work.wait()
        if not torch.cuda.is_current_stream_capturing():
            end: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record(torch.cuda.current_stream(device))
            self._group = group
            self._started.append(_Started(end, time.monotonic(), self.activity))

    def leave(self) -> None:
        self.activity = self.activity._replace(inside=False)

    def failed(self, error: Exception | None, seconds: float) -> ExpertParallelError:
        """The error of a wait that ended in ``error``, or did not end, after so many ``seconds``."""
        return ExpertParallelError(self._fail(self.activity, error, seconds))

    def tell(self, error: Exception) -> None:
        """No further call can work because of an error of this rank alone: let the others know, who wait."""
        self.failure = str(error)
        self._tell("failed", json.dumps((self.activity, self.failure)))

    def _fail(self, activity: Activity, error: Exception | None, seconds: float) -> str:
        self.failure = self._sentence(activity, error, seconds)
        self._tell("failed", json.dumps((activity, self.failure)))
        return self.failure

    # ---- what ranks know of each other -------------------------------------------------------------------------------

    def _tell(self, kind: str, text: str) -> None:
        if self._store is not None:
            try:
                self._store.set(f"{kind}/{self.rank}", text)
            except RuntimeError:  # the process that holds the store is gone
                self._store = None

    def _told(self, kind: str, rank: int) -> str | None:
        """What a rank has told, if anything; never waits for it."""
        if self._store is None:
            return None
        key = f"{kind}/{rank}"
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:
            self._store = None
            return None

    def _sentence(self, mine: Activity, error: Exception | None, seconds: float) -> str:
        others = [rank for rank in range(self.size) if rank != self.rank]
        before = {rank: self._told("alive", rank) for rank in others}
        time.sleep(BEATS_OF_SILENCE * self.beat_s)
        late = seconds >= 0.99 * self.limit_s
        what = f"waited {seconds:.3g} s" if late else f"failed after {seconds:.3g} s"
        sentences = [f"{self.what}: rank {self.rank} {what} {mine}."]
        if self._store is None:
            sentences.append("Nothing is known of the other ranks: the store of torch.distributed is gone.")
        else:
            found = [self._about(rank, before[rank], mine) for rank in others]
            found = [s for s in found if s] or ["All ranks are there: the network between them is slow or broken."]
            failures = [s for s in found if _FAILED in s][1:]  # one of them says it all
            sentences += [s for s in found if s not in failures]
        if late:
            sentences.append("ExpertParallel(timeout_s=...) sets the limit.")
        elif error is not None:
            sentences.append(f"torch says: {str(error).splitlines()[0]}")
        return " ".join(sentences)

    def _about(self, rank: int, before: str | None, mine: Activity) -> str:
        """Why it is this rank that does not come; empty if it has come."""
        if self._told("left", rank) is not None:
            return f"Rank {rank} has closed its ExpertParallel."
        if (told := self._told("failed", rank)) is not None:
            activity, failure = json.loads(told)
            return "" if Activity(*activity) == mine else f"Rank {rank}{_FAILED}{failure}"
        now = self._told("alive", rank)
        if now is None:
            return f"Rank {rank} has never reported."
        activity = Activity(*json.loads(now)[1])
        if now == before:
            return f"Rank {rank} no longer reports, last seen {activity}: it crashed, was killed, or lost its network."
        if activity == mine:
            return ""
        return f"Rank {rank} is {activity}: it is slow, or calls something else (other layers, other steps)."

    # ---- the thread --------------------------------------------------------------------------------------------------

    def beat(self, number: int) -> None:
        self._tell("alive", json.dumps((number, self.activity)))
        oldest = self._started[0] if self._started else None
        # An event is asked only when it is late: asking while another thread captures a CUDA graph would break that.
        if oldest is None or time.monotonic() - oldest.at < self.limit_s or oldest.end.query():
            return
        self._started.clear()
        log.error(self._fail(oldest.activity, None, time.monotonic() - oldest.at))
        abort = getattr(self._group, "abort", None)
        if abort is not None:
            abort()


def _look_after(watch: weakref.ref[Watch], stop: threading.Event, beat_s: float) -> None:
    for number in itertools.count():
        found = watch()
        if found is None:
            return
        found.beat(number)
        del found
        if stop.wait(beat_s):
            return


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join(LONGEST_END_S)
