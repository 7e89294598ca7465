"""Work under which workers have died, waiting for a run without company. Pure.

When a worker dies, its router cannot see which of the requests there did it. Those that meet more
deaths before their next new token are suspects. One of them at a time runs on a pair that nothing
else enters until it has given a token: if a worker dies then, it died of the suspect or by chance.
"""

from paceline.request import AttemptKey
from paceline.router.active_request import WaitingWork
from paceline.router.returned_work import ReturnedWork


class Suspects:
    """The suspects of one router, oldest first."""

    def __init__(self) -> None:
        self._waiting: ReturnedWork[WaitingWork] = ReturnedWork()
        self._num_pushed = 0
        self.running: AttemptKey | None = None
        """The one that runs alone."""

    def __len__(self) -> int:
        return len(self._waiting)

    def push(self, work: WaitingWork, not_before_s: float) -> None:
        self._num_pushed += 1
        self._waiting.push(work, self._num_pushed, not_before_s)

    def remove(self, work: WaitingWork) -> None:
        """Take out work that has been sent or cancelled; it need not be here."""
        self._waiting.remove(work)

    def head(self, now: float) -> WaitingWork | None:
        """Look at the work whose turn it is; None when none may go now."""
        return self._waiting.head(now)

    def next_ready_s(self, now: float) -> float | None:
        """Return when the next backoff ends; None when none runs."""
        return self._waiting.next_ready_s(now)
