"""The signals that end a command: what they raise, and how they wait for work that must be whole.

Signals reach Python's main thread only. On another thread, nothing here does anything.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what systemd, Docker and Kubernetes send; a terminal that was closed."""


class Ended(SystemExit):
    """A signal asks this command to end. Exits with the status that shells give for the signal.

    A SystemExit, because asyncio, Typer and `except Exception` all let it through.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Hold:
    """The signals that came while `held` kept them waiting."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    @property
    def has_signal(self) -> bool:
        return bool(self.numbers)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal; a handler for `signal.signal`."""
        self.numbers.append(number)


def raise_ended() -> None:
    """Make the next of these signals raise Ended; those after it find the command ending already.

    A signal that is ignored stays so, as nohup wants it. Whoever catches Ended and goes on calls
    this again.
    """
    for number in END_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


@contextlib.contextmanager
def held() -> Iterator[Hold]:
    """Let signals wait for the end of the block. The first one then has its usual effect.

    A block that takes long looks at `Hold.has_signal`. Whatever the block does to the handlers is
    undone: Ray's C++ code takes SIGTERM's away without Python's knowledge.
    """
    hold = Hold()
    with _kept():
        if _is_main_thread():
            for number in END_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, hold.note)
        yield hold
    if hold.has_signal:
        signal.raise_signal(hold.numbers[0])


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Put every handler back at the end of the block."""
    if not _is_main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise(number: int, frame: FrameType | None) -> None:
    # Another Ended could cut what cleans up after this one: systemd may send two signals at once.
    for other in END_SIGNALS:
        if signal.getsignal(other) is _raise:
            signal.signal(other, _end_already)
    raise Ended(number)


def _end_already(number: int, frame: FrameType | None) -> None:
    """Do nothing: this is no SIG_IGN, which child processes would inherit."""
