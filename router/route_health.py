"""Workers and pairs of workers that give work back instead of doing it. Pure.

A worker that refuses or fails whatever it gets, and a pair between which no KV moves, look idle, so
placement would send everything there. After a failure nothing goes that way for a while, twice as
long after each further one, and then one piece of work at a time. What works again is like any
other at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

Route = tuple[str, ...]
"""(worker_id,), or (prefill_id, decode_id) where it takes both to fail."""


@dataclass(slots=True)
class _Row:
    num_failures: int = 0
    """In a row."""
    failed_s: float = float("-inf")
    rests_until_s: float = float("-inf")
    is_refusing: bool = False
    """Whether an admission already shows that it works again."""
    is_tried: bool = False
    """Whether work is there whose end will tell."""


class RouteHealth:
    """The failures of one router's workers since they worked last."""

    def __init__(self, first_rest_s: float = 0.1, max_rest_s: float = 30.0) -> None:
        self._first_rest_s = first_rest_s
        self._max_rest_s = max_rest_s
        self._rows: dict[Route, _Row] = {}
        self._routes_of: dict[str, set[Route]] = {}
        """Those with a row, by each of their workers."""
        self._now = 0.0

    @property
    def has_failures(self) -> bool:
        return bool(self._rows)

    def wake(self, now: float) -> None:
        """Let rests end that end by now."""
        self._now = now

    def failed(self, route: Route, sent_s: float, now: float, *, is_refusal: bool = False) -> float:
        """Count a failure of work that was sent at `sent_s`; return the rest that it brings.

        Work that was already there at the last failure tells nothing new: one event can end many.
        """
        row = self._rows.setdefault(route, _Row())
        for worker_id in route:
            self._routes_of.setdefault(worker_id, set()).add(route)
        if sent_s < row.failed_s:
            return 0.0
        row.num_failures += 1
        # One refusal is usual: credit is a message old.
        num_rests = row.num_failures - is_refusal
        rest_s = self._first_rest_s * 2.0 ** min(num_rests - 1, 32) if num_rests else 0.0
        row.failed_s = now
        rest_s = min(rest_s, self._max_rest_s)
        row.rests_until_s = now + rest_s
        row.is_refusing = is_refusal
        row.is_tried = False
        return rest_s

    def admitted(self, worker_id: str) -> None:
        """Note that a worker has taken work."""
        row = self._rows.get((worker_id,))
        if row is not None and row.is_refusing:
            self._drop((worker_id,))

    def worked(self, route: Route) -> None:
        """Note that work has gone well on this route."""
        if route in self._rows:
            self._drop(route)

    def forget(self, worker_id: str) -> None:
        """Drop what is known of a worker that has gone."""
        for route in list(self._routes_of.get(worker_id, ())):
            self._drop(route)

    def sent(self, prefill_id: str | None, decode_id: str) -> None:
        """Count work as sent."""
        for row in self._rows_of(prefill_id, decode_id):
            row.is_tried = True

    def ended(self, prefill_id: str | None, decode_id: str) -> None:
        """Count work as ended, well or not."""
        for row in self._rows_of(prefill_id, decode_id):
            row.is_tried = False

    def is_resting(self, prefill_id: str | None, decode_id: str) -> bool:
        """Whether work should rather go elsewhere now."""
        return any(self._is_resting(row) for row in self._rows_of(prefill_id, decode_id))

    def is_resting_worker(self, worker_id: str) -> bool:
        """Whether every route of a worker rests, because it rests itself."""
        row = self._rows.get((worker_id,))
        return row is not None and self._is_resting(row)

    def num_failures(self, prefill_id: str | None, decode_id: str) -> int:
        return max((row.num_failures for row in self._rows_of(prefill_id, decode_id)), default=0)

    def _is_resting(self, row: _Row) -> bool:
        return row.is_tried or row.rests_until_s > self._now

    def _drop(self, route: Route) -> None:
        del self._rows[route]
        for worker_id in route:
            routes = self._routes_of[worker_id]
            routes.discard(route)
            if not routes:
                del self._routes_of[worker_id]

    def _rows_of(self, prefill_id: str | None, decode_id: str) -> Iterator[_Row]:
        if not self._rows:
            return
        routes: list[Route] = [(decode_id,)]
        if prefill_id is not None:
            routes += [(prefill_id,), (prefill_id, decode_id)]
        for route in routes:
            if route in self._rows:
                yield self._rows[route]
