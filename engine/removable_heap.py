"""A heap whose items may leave from anywhere or change their place."""

import heapq
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)
Key = tuple[float, ...]


class RemovableHeap(Generic[ItemT]):
    """Items by key, the smallest first. Each change is O(log n), `remove` is O(1) on average.

    An item that leaves from the middle leaves its entry behind. Such entries are dropped when they
    come to the top, or all at once when they are the greater part.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[Key, int, ItemT]] = []
        self._numbers: dict[ItemT, int] = {}
        """The number of each item's own entry. Among equal keys the oldest entry is first."""
        self._num_entries_made = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[ItemT]:
        """Give the items in no order."""
        return iter(self._numbers)

    def first(self) -> ItemT | None:
        """Find the item with the smallest key, without removing it."""
        entries = self._entries
        while entries and not self._is_live(entries[0]):
            heapq.heappop(entries)
        return entries[0][2] if entries else None

    def put(self, item: ItemT, key: Key) -> None:
        """Add an item, or give it another key."""
        self._num_entries_made += 1
        self._numbers[item] = self._num_entries_made
        heapq.heappush(self._entries, (key, self._num_entries_made, item))
        self._drop_dead_entries()

    def remove(self, item: ItemT) -> None:
        """Take an item out. Raises KeyError if it is not there."""
        del self._numbers[item]
        self._drop_dead_entries()

    def _is_live(self, entry: tuple[Key, int, ItemT]) -> bool:
        return self._numbers.get(entry[2]) == entry[1]

    def _drop_dead_entries(self) -> None:
        if len(self._entries) > 2 * len(self._numbers) + 16:
            self._entries = [entry for entry in self._entries if self._is_live(entry)]
            heapq.heapify(self._entries)
