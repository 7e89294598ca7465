"""Work that came back from workers, in its own order, some of it waiting out a back-off. Pure.

Whatever may go stands in one heap by its place in the order, whatever backs off in another by the
end of that, and moves once. Removed entries are skipped when they come to the top, and are swept
out when they are the larger part, so that every change costs O(log n) in the long run.
"""

import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_MIN_SWEPT = 64
"""Entries of a heap below which it is not worth a sweep."""


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    item: T
    place: tuple[float, int]
    not_before_s: float
    is_removed: bool = False


class ReturnedWork(Generic[T]):
    """Hold items, each once, until their back-off ends and their turn comes."""

    def __init__(self) -> None:
        self._order = itertools.count()
        self._entries: dict[T, _Entry[T]] = {}
        self._ready: list[tuple[tuple[float, int], _Entry[T]]] = []
        self._backing_off: list[tuple[tuple[float, int], _Entry[T]]] = []
        """By (not_before_s, order)."""

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, item: T, arrived_s: float, not_before_s: float) -> None:
        """Add an item that goes before those that arrived later, and not before a time."""
        order = next(self._order)
        entry = _Entry(item, (arrived_s, order), not_before_s)
        self._entries[item] = entry
        heapq.heappush(self._backing_off, ((not_before_s, order), entry))

    def remove(self, item: T) -> bool:
        """Take an item out; say whether it was here."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        entry.is_removed = True
        num_entries = len(self._ready) + len(self._backing_off)
        if num_entries > max(_MIN_SWEPT, 2 * len(self._entries)):
            for heap in (self._ready, self._backing_off):
                heap[:] = [pair for pair in heap if not pair[1].is_removed]
                heapq.heapify(heap)
        return True

    def head(self, now: float) -> T | None:
        """Look at the item whose turn it is; None when none may go now."""
        while self._backing_off and self._backing_off[0][1].not_before_s <= now:
            _, entry = heapq.heappop(self._backing_off)
            if not entry.is_removed:
                heapq.heappush(self._ready, (entry.place, entry))
        _skip_removed(self._ready)
        return self._ready[0][1].item if self._ready else None

    def next_ready_s(self, now: float) -> float | None:
        """Return when the next back-off ends; None when none runs."""
        self.head(now)
        _skip_removed(self._backing_off)
        return self._backing_off[0][1].not_before_s if self._backing_off else None


def _skip_removed(heap: list[tuple[tuple[float, int], _Entry[T]]]) -> None:
    while heap and heap[0][1].is_removed:
        heapq.heappop(heap)
