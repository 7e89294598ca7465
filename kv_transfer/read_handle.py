"""The state of one read, shared by the thread that moves the bytes and whoever waits for it."""

import logging
import threading
import time
from collections.abc import Callable

from paceline.kv_transfer.transport import ReadOutcome, ReadState

logger = logging.getLogger(__name__)


class PendingRead:
    """A read from its start to its end; satisfies `ReadHandle`.

    Ends once: RUNNING → DONE | FAILED; ending it again does nothing, so that a close and the last
    byte may race. Whoever ends it vouches that nothing writes to its target blocks any more.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._started_s = time.time()
        self._lock = threading.Lock()
        self._outcome: ReadOutcome | None = None
        self._callbacks: list[Callable[[ReadOutcome], None]] = []

    @property
    def state(self) -> ReadState:
        outcome = self._outcome
        return ReadState.RUNNING if outcome is None else outcome.state

    def add_done_callback(self, callback: Callable[[ReadOutcome], None]) -> None:
        with self._lock:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        _call(callback, self._outcome)

    def finish(self) -> None:
        """End as DONE: every byte is in place."""
        self._end(ReadState.DONE, self.num_bytes, "")

    def fail(self, error: str) -> None:
        """End as FAILED: the target blocks hold garbage, and stay as they are."""
        self._end(ReadState.FAILED, 0, error)

    def _end(self, state: ReadState, num_bytes: int, error: str) -> None:
        with self._lock:
            if self._outcome is not None:
                return
            outcome = ReadOutcome(state, num_bytes, self._started_s, time.time(), error)
            self._outcome = outcome
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            _call(callback, outcome)


def _call(callback: Callable[[ReadOutcome], None], outcome: ReadOutcome) -> None:
    # A waiter's bug must not stop the thread that moves everyone's blocks.
    try:
        callback(outcome)
    except Exception:
        logger.exception("a callback of a KV read failed; outcome=%s", outcome)
