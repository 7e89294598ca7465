"""The one place where work waits. Pure: time comes in as an argument.

Two parts. Resumed work (it ran before and lost its worker) stands at the head, ordered by the
request's first arrival, and is never refused. New work waits in one line per tenant; tenants take
turns. Whoever is at the head blocks those behind it until it can be placed, so large requests do
not starve; only work that waits out a backoff lets others pass.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from paceline.errors import QueueFullError
from paceline.router.returned_work import ReturnedWork

T = TypeVar("T", bound=Hashable)

_RATE_WEIGHT = 0.1  # of the newest interval in the running mean: some ten departures are remembered
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 30.0


class WaitingQueue(Generic[T]):
    """Hold work until it can be placed. `T` is compared by identity or value, as its hash says."""

    def __init__(self, max_new: int) -> None:
        self._max_new = max_new
        self._resumed: ReturnedWork[T] = ReturnedWork()
        # Not plain dicts: to find the first key of one takes as long as many were taken before it.
        self._lines: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        """Of tenants with new work, in turn order."""
        self._num_new = 0
        self._mean_interval_s: float | None = None
        self._last_departure_s: float | None = None

    def __len__(self) -> int:
        return self._num_new + len(self._resumed)

    @property
    def num_new(self) -> int:
        """Waiting requests that have never run."""
        return self._num_new

    def num_ahead(self, tenant: str) -> int:
        """Return how many leave, at most, before the next new work of a tenant: tenants take
        turns."""
        line = self._lines.get(tenant)
        num_lines = len(self._lines) + (line is None)
        num_new = min(self._num_new, (len(line or ()) + 1) * num_lines - 1)
        return len(self) - self._num_new + num_new

    def check_room(self) -> None:
        """Raise QueueFullError if no new work may join."""
        if self._num_new >= self._max_new:
            retry_s = self.retry_after_s()
            raise QueueFullError(
                f"{self._num_new} requests wait and router.max_queue_requests is {self._max_new}; "
                f"try again in about {retry_s:.1f} s, add workers, or raise that setting",
                retry_after_s=retry_s,
            )

    def retry_after_s(self) -> float:
        """Estimate when a tenth of the queue will have left, from the pace of the last
        departures."""
        if self._mean_interval_s is None:
            return 1.0
        wanted = max(1, self._num_new // 10)
        return min(max(wanted * self._mean_interval_s, _MIN_RETRY_S), _MAX_RETRY_S)

    def push_new(self, item: T, tenant: str) -> None:
        """Append work at the end of its tenant's line; raises QueueFullError at the bound."""
        self.check_room()
        self._lines.setdefault(tenant, OrderedDict())[item] = None
        self._num_new += 1

    def push_resumed(self, item: T, arrived_s: float, not_before_s: float) -> None:
        """Put work back at the head, behind resumed work that arrived earlier."""
        self._resumed.push(item, arrived_s, not_before_s)

    def remove(self, item: T, tenant: str) -> bool:
        """Take out work that has been cancelled; say whether it was here."""
        line = self._lines.get(tenant)
        if line is None or item not in line:
            return self._resumed.remove(item)
        del line[item]
        self._num_new -= 1
        if not line:
            del self._lines[tenant]
        return True

    def head(self, now: float) -> T | None:
        """Look at the work whose turn it is, or None when nothing may go now."""
        resumed = self._resumed.head(now)
        if resumed is not None or not self._lines:
            return resumed
        return next(iter(self._lines[next(iter(self._lines))]))

    def pop(self, now: float) -> T:
        """Take the work that `head` shows; raises IndexError when there is none."""
        resumed = self._resumed.head(now)
        if resumed is not None:
            self._resumed.remove(resumed)
            return resumed
        if not self._lines:
            raise IndexError("nothing may leave the queue now")
        tenant = next(iter(self._lines))
        line = self._lines[tenant]
        item, _ = line.popitem(last=False)
        if line:
            self._lines.move_to_end(tenant)  # to the end of the turns
        else:
            del self._lines[tenant]
        self._num_new -= 1
        self._note_departure(now)
        return item

    def next_ready_s(self, now: float) -> float | None:
        """Return when the next backoff ends; None when none runs."""
        return self._resumed.next_ready_s(now)

    def _note_departure(self, now: float) -> None:
        if self._last_departure_s is not None:
            interval = now - self._last_departure_s
            mean = self._mean_interval_s
            self._mean_interval_s = (
                interval if mean is None else mean + _RATE_WEIGHT * (interval - mean)
            )
        self._last_departure_s = now
