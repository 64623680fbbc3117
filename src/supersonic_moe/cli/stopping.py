"""A command that Ctrl-C or SIGTERM ends in order: a sentence and the exit code of the signal, and no traceback."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
GRACE_S = 5.0
"""How long the command may take to end. Python hears of a signal between two of its instructions only, so a call that
waits for a GPU or another rank for ever would not let it end.
"""


class Stopped(KeyboardInterrupt):
    """Of a signal. Like Ctrl-C it is none of the errors that a case may have."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def stoppable(say: Callable[[str], None]) -> Iterator[None]:
    """Ends what runs inside at the first signal: ``say`` gets its name, and the exit code is 130 or 143. Signals that
    follow change nothing; those that the process ignored before, as under nohup, it ignores here.
    """
    if threading.current_thread() is not threading.main_thread():  # no other one may ask for signals
        yield
        return
    ended = threading.Event()
    heard, sends = socket.socketpair()
    sends.setblocking(False)
    first: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        first.append(number)
        if len(first) == 1:
            raise Stopped(number)

    def end_in_time() -> None:
        """Reads what Python writes at once, whatever the main thread is waiting for."""
        while number := heard.recv(1):
            if number[0] in SIGNALS and not ended.wait(GRACE_S):
                _at_most(1.0, lambda: say(SIGNALS[signal.Signals(number[0])]))
                os._exit(128 + number[0])

    watch = threading.Thread(target=end_in_time, daemon=True)
    watch.start()
    wakeup = signal.set_wakeup_fd(sends.fileno(), warn_on_full_buffer=False)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    except KeyboardInterrupt as error:
        stop = signal.Signals(error.number) if isinstance(error, Stopped) else signal.SIGINT
        say(SIGNALS[stop])
        raise typer.Exit(128 + stop) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        ended.set()
        sends.close()
        watch.join()
        heard.close()


def _at_most(seconds: float, action: Callable[[], None]) -> None:
    """Its output may wait for a reader that is gone."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(seconds)
