"""Slots and blocks that nobody wants any more, until no step in flight uses them."""

from collections import deque
from typing import NamedTuple

import numpy as np

from paceline.decode_worker.attempts import Attempt
from paceline.decode_worker.batch import SlotTables
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import PrefixCache
from paceline.errors import IntegrityError


class Departure(NamedTuple):
    """What is freed once step `after_step` has been applied."""

    after_step: int
    slots: tuple[int, ...]
    block_ids: tuple[int, ...]
    """In the order of the sequence."""
    attempt: Attempt | None = None
    """Cache the full blocks below this attempt's context; None: they must not be cached."""
    num_tokens: int = 0
    """Tokens of the sequence whose KV is final once `after_step` has been applied."""


class Departures:
    """Frees in the order of ending, after caching the full blocks of confirmed sequences."""

    def __init__(
        self,
        allocator: BlockAllocator,
        prefix_cache: PrefixCache,
        tables: SlotTables,
        free_slots: list[int],
        block_tokens: int,
    ) -> None:
        self._allocator = allocator
        self._prefix_cache = prefix_cache
        self._tables = tables
        self._free_slots = free_slots
        self._block_tokens = block_tokens
        self._waiting: deque[Departure] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def slots(self) -> list[int]:
        return [slot for departure in self._waiting for slot in departure.slots]

    @property
    def block_ids(self) -> list[int]:
        return [block_id for departure in self._waiting for block_id in departure.block_ids]

    def num_blocks_coming(self) -> int:
        """Blocks that can be allocated once everything here has gone."""
        leaving = np.array(self.block_ids, dtype=np.int64)
        if not len(leaving):
            return 0
        ids, counts = np.unique(leaving, return_counts=True)
        pairs = zip(ids.tolist(), counts.tolist(), strict=True)
        return sum(
            self._allocator.num_references(block_id) == count
            and not self._allocator.num_pins(block_id)
            for block_id, count in pairs
        )

    def add(self, departure: Departure) -> None:
        """Take a departure; `after_step` never goes down from one to the next."""
        if self._waiting and departure.after_step < self._waiting[-1].after_step:
            raise IntegrityError(
                f"a departure after step {departure.after_step} was added behind one after step "
                f"{self._waiting[-1].after_step}: it would be freed too late"
            )
        self._waiting.append(departure)

    def settle(self, applied_step: int) -> None:
        """Free what no step after `applied_step` uses."""
        waiting = self._waiting
        while waiting and waiting[0].after_step <= applied_step:
            departure = waiting.popleft()
            if departure.attempt is not None:
                self._cache(departure, departure.attempt)
            self._allocator.release(departure.block_ids)
            self._free_slots.extend(departure.slots)

    def _cache(self, departure: Departure, attempt: Attempt) -> None:
        size = self._block_tokens
        tokens = self._tables.tokens[departure.slots[0]]
        chain = attempt.chain
        for number in range(attempt.num_cached_blocks, departure.num_tokens // size):
            chain = self._prefix_cache.insert(
                chain, tokens[number * size : (number + 1) * size], departure.block_ids[number]
            )
