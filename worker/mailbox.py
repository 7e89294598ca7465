"""How other threads talk to the engine thread: calls in a queue, run before a step is planned."""

import threading
from collections import deque
from collections.abc import Callable

MAX_CALLS = 65_536
"""Far more than the largest worker's requests bring during its longest step."""

Call = Callable[[float], None]
"""Takes the time at which it runs."""


class Mailbox:
    """Calls for the engine thread. `post` and `wake` work on any thread and never block."""

    def __init__(self) -> None:
        self._calls: deque[Call] = deque()
        self._wake = threading.Event()

    @property
    def is_full(self) -> bool:
        """Whether sessions should bring nothing more; what must be said may still be posted."""
        return len(self._calls) >= MAX_CALLS

    def post(self, call: Call) -> None:
        self._calls.append(call)
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    def run_calls(self, now: float) -> int:
        """Run what has been posted, in order; say how many calls that was. Engine thread only."""
        self._wake.clear()
        num_calls = 0
        while self._calls:
            self._calls.popleft()(now)
            num_calls += 1
        return num_calls

    def wait(self, timeout_s: float) -> None:
        """Wait, with the GIL released, for a post or the time-out."""
        self._wake.wait(timeout_s)
