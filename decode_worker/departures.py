"""Slots and blocks that nobody wants any more, until no step in flight uses them."""

from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

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


class BlocksComing:
    """Counts the blocks that can be allocated once some departures have gone.

    Right as long as nobody else takes or drops a reference or pin meanwhile.
    """

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self._num_leaving: dict[int, int] = {}
        """References of each block that the departures have."""
        self.count = 0

    def add(self, departures: Iterable[Departure]) -> None:
        allocator, num_leaving = self._allocator, self._num_leaving
        for departure in departures:
            for block_id in departure.block_ids:
                num_leaving[block_id] = num_leaving.get(block_id, 0) + 1
                is_last = num_leaving[block_id] == allocator.num_references(block_id)
                self.count += is_last and not allocator.num_pins(block_id)


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

    def newest(self, count: int) -> list[Departure]:
        """Give those that were added last."""
        return list(islice(reversed(self._waiting), count))

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
