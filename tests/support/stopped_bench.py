"""``supersonic-moe bench cups``: three stand-in cases, the second of which may end the command or its process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from command_line import outcome
from forks import context

from supersonic_moe import cli
from supersonic_moe.bench.report import OURS, CaseResult
from supersonic_moe.bench.suite import OverRanks, Progress
from supersonic_moe.bench.timing import LastCaseError, NoResultError
from supersonic_moe.cli import bench, stopping

CASES = ("espresso", "lungo", "latte")


@dataclass(frozen=True, kw_only=True)
class Cups(OverRanks[str, CaseResult]):
    """How long cups take."""

    name = "cups"
    files: ClassVar = {"cups": {}}

    end: Annotated[str, typer.Option(help="How the second cup ends.")] = ""

    heading = "Cups"
    method = "One after the other."

    @contextmanager
    def around(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.end == "two signals":
                _send(signal.SIGTERM)

    def cases(self) -> Sequence[str]:
        return CASES

    def run(self, case: str, progress: Progress) -> CaseResult:
        progress("pouring")
        if case == "lungo" and self.end:
            ENDINGS[self.end]()
        return CaseResult(case, {OURS: {"us": 1.0}})

    def write(self, results: Sequence[CaseResult], missing: Sequence[str], commit: str) -> Sequence[Path]:
        if self.end == "while it is written" and len(results) == 2 and not _interrupted:
            _interrupted.append(True)
            raise KeyboardInterrupt
        return super().write(results, missing, commit)


_interrupted: list[bool] = []


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # Python hears of it between two instructions


def _raise(error: BaseException) -> None:
    raise error


def _stuck() -> None:
    """In a call that no signal ends, as one that waits for a GPU or another rank."""
    stopping.GRACE_S = 0.3
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


ENDINGS: dict[str, Callable[[], None]] = {
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "SIGINT": lambda: _send(signal.SIGINT),
    "SIGTERM": lambda: _send(signal.SIGTERM),
    "SIGKILL": lambda: _send(signal.SIGKILL),
    "two signals": lambda: _send(signal.SIGINT),
    "a call that does not end": _stuck,
    "while it is written": lambda: None,
    "no result": lambda: _raise(NoResultError("no water")),
    "the last case": lambda: _raise(LastCaseError("no power")),
    "an error": lambda: _raise(ZeroDivisionError("a fault of the suite")),
}


def _add_command() -> None:
    """To the command line of this process."""
    bench.app.command(Cups.name)(bench._command(Cups))


def ended(folder: Path, *args: str) -> tuple[int, str]:
    """Exit code, below 0 that of a signal, and output of the command line in a process of its own."""
    process = context().Process(target=_command, args=(folder / "output", args))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode is not None, "it does not end"
    return process.exitcode, (folder / "output").read_text()


def _command(output: Path, args: tuple[str, ...]) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.environ["COLUMNS"] = "200"
    sys.argv = ["supersonic-moe", *args]
    _add_command()
    cli.main()


def of_rank(*args: Any) -> tuple[int, str]:
    """Exit code and output of the command on a rank of torchrun, whose number stands for the commit."""
    _add_command()
    return outcome("bench", "cups", "--commit", f"of rank {os.environ['RANK']}", *args)
