"""Who uses which KV block of one pool.

Each block has two counters and one flag:

- *references*: sequences whose block table has it. More than one: a writer must copy it first.
- *pins*: leases that let another worker read it. A pin forbids reuse and eviction, and never
  causes a copy.
- *cached*: the prefix cache knows its content, so it must not be written any more.

and from them follows what it is:

    references or pins   cached   the block is
    yes                  any      in use
    none                 yes      evictable: it keeps its content until memory is needed
    none                 no       free, on the free list

Every change is O(1) a block, and a call that fails has changed nothing.
"""

from collections.abc import Sequence
from typing import Protocol

from paceline.errors import IntegrityError, OutOfBlocksError


class EvictionPolicy(Protocol):
    """Orders the evictable blocks: the prefix cache. Called by the allocator alone."""

    def on_evictable(self, block_ids: Sequence[int]) -> None:
        """Take cached blocks that nobody uses any more, in the order of their sequence."""

    def on_used(self, block_ids: Sequence[int]) -> None:
        """Give up evictable blocks because somebody uses them again; they stay cached."""

    def evict(self, count: int) -> None:
        """Forget at least `count` evictable blocks, by way of `BlockAllocator.uncache`.

        Never asked for more than there are.
        """

    def check_integrity(self) -> None:
        """Raise IntegrityError unless cache and allocator agree."""


class BlockAllocator:
    """Blocks 0 to num_blocks - 1 of one pool. Used by the engine thread alone."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least 1 block, not {num_blocks}")
        self.num_blocks = num_blocks
        # Plain lists: indexing one takes a third of the time that a NumPy scalar takes.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._pins = [0] * num_blocks
        self._cached = [False] * num_blocks
        self._num_evictable = 0
        self._policy: EvictionPolicy | None = None

    @property
    def num_free(self) -> int:
        """Blocks on the free list."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free or evictable."""
        return len(self._free) + self._num_evictable

    def num_references(self, block_id: int) -> int:
        return self._references[block_id]

    def num_pins(self, block_id: int) -> int:
        return self._pins[block_id]

    def is_shared(self, block_id: int) -> bool:
        """Whether a writer must copy the block first. Pins do not count."""
        return self._references[block_id] > 1

    def is_cached(self, block_id: int) -> bool:
        """Whether the prefix cache knows the block, so that nobody may write it."""
        return self._cached[block_id]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, one reference each, evicting cached ones if the free list is short.

        Raises OutOfBlocksError, and takes none, if free and evictable blocks together are too few.
        """
        free = self._free
        short = count - len(free)
        if short > 0:
            self._evict(count, short)
        elif count < 0:
            raise ValueError(f"{count} blocks were asked for; a count cannot be negative")
        rest = len(free) - count
        taken = free[rest:]
        del free[rest:]
        references = self._references
        for block_id in taken:
            references[block_id] = 1
        return taken

    def share(self, block_ids: Sequence[int]) -> None:
        """Add a reference to each block, which is referenced already or cached."""
        references, cached = self._references, self._cached
        self._check_range(block_ids, "shared")
        first = [block_id for block_id in block_ids if not references[block_id]]
        for block_id in first:
            if not cached[block_id]:
                raise IntegrityError(
                    f"block {block_id} cannot be shared: it has 0 references, "
                    f"{self._pins[block_id]} pins and is not cached, so its content belongs to "
                    "nobody"
                )
        for block_id in block_ids:
            references[block_id] += 1
        if first:
            self._take_from_evictable(first, self._pins)

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop a reference from each block, given in the order of their sequence.

        A block that nobody references or pins becomes evictable if it is cached, else free.
        """
        ended = self._subtract(self._references, block_ids, "reference", "released")
        if ended:
            self._give_back(ended, self._pins)

    def pin(self, block_ids: Sequence[int]) -> None:
        """Add a pin to each block, which is in use or evictable."""
        references, pins, cached = self._references, self._pins, self._cached
        self._check_range(block_ids, "pinned")
        first = [block_id for block_id in block_ids if not pins[block_id]]
        for block_id in first:
            if not references[block_id] and not cached[block_id]:
                raise IntegrityError(
                    f"block {block_id} cannot be pinned: it is free, its content may change"
                )
        for block_id in block_ids:
            pins[block_id] += 1
        if first:
            self._take_from_evictable(first, references)

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Drop a pin from each block, which ends as in `release` if nobody uses it any more."""
        ended = self._subtract(self._pins, block_ids, "pin", "unpinned")
        if ended:
            self._give_back(ended, self._references)

    # Called by the prefix cache.

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Name the one prefix cache of this pool."""
        if self._policy is not None:
            raise ValueError("this pool has a prefix cache already")
        self._policy = policy

    def set_cached(self, block_id: int) -> None:
        """Mark a block as known to the prefix cache; a sequence must reference it."""
        self._check_range((block_id,), "cached")
        if not self._references[block_id] or self._cached[block_id]:
            raise IntegrityError(
                f"block {block_id} cannot be cached: it has {self._references[block_id]} "
                f"references and {'is' if self._cached[block_id] else 'is not'} cached already"
            )
        self._cached[block_id] = True

    def uncache(self, block_ids: Sequence[int]) -> None:
        """Take back the mark of cached blocks; those that nobody uses become free."""
        for block_id in block_ids:
            if not self._cached[block_id]:
                raise IntegrityError(f"block {block_id} cannot leave the cache: it is not cached")
            self._cached[block_id] = False
            if not self._references[block_id] and not self._pins[block_id]:
                self._num_evictable -= 1
                self._free.append(block_id)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless counts, flags, free list and cache add up. O(num_blocks)."""
        counted_free = counted_evictable = 0
        for block_id in range(self.num_blocks):
            references, pins = self._references[block_id], self._pins[block_id]
            if references < 0 or pins < 0:
                raise IntegrityError(f"block {block_id} has {references} references, {pins} pins")
            if not references and not pins:
                counted_evictable += self._cached[block_id]
                counted_free += not self._cached[block_id]
        free = set(self._free)
        if len(free) != len(self._free) or len(free) != counted_free:
            raise IntegrityError(
                f"{counted_free} blocks of {self.num_blocks} are used by nobody and not "
                f"cached, but the free list has {len(self._free)} entries, {len(free)} of them "
                "different"
            )
        for block_id in free:
            if self._references[block_id] or self._pins[block_id] or self._cached[block_id]:
                raise IntegrityError(
                    f"block {block_id} is on the free list with {self._references[block_id]} "
                    f"references, {self._pins[block_id]} pins, cached={self._cached[block_id]}"
                )
        if counted_evictable != self._num_evictable:
            raise IntegrityError(
                f"{counted_evictable} cached blocks are used by nobody, but "
                f"{self._num_evictable} are counted as evictable"
            )
        if self._policy is not None:
            self._policy.check_integrity()

    def _evict(self, count: int, short: int) -> None:
        if self._policy is None or short > self._num_evictable:
            in_use = self.num_blocks - self.num_available
            raise OutOfBlocksError(
                f"{count} KV blocks were asked for; {len(self._free)} are free and "
                f"{self._num_evictable} can be evicted of {self.num_blocks}, because {in_use} "
                "are in use. Raise num_kv_blocks or gpu_memory_utilization, or lower max_num_seqs"
            )
        self._policy.evict(short)
        if len(self._free) < count:
            raise IntegrityError(
                f"{short} blocks were to be evicted, but only {len(self._free)} of {count} are free"
            )

    def _take_from_evictable(self, first: list[int], others: list[int]) -> None:
        """Count blocks as used that had no reference (or pin) until now; `first` may repeat one.

        Where the other counter is zero too the block was evictable: callers have refused free ones.
        """
        used = list(dict.fromkeys(block_id for block_id in first if not others[block_id]))
        if used and self._policy is not None:
            self._num_evictable -= len(used)
            self._policy.on_used(used)

    def _subtract(
        self, counts: list[int], block_ids: Sequence[int], noun: str, verb: str
    ) -> list[int]:
        """Take one from each count and return the blocks that have none left, or change nothing."""
        self._check_range(block_ids, verb)
        ended = []
        is_wrong = False
        for block_id in block_ids:
            left = counts[block_id] - 1
            counts[block_id] = left
            if left <= 0:
                ended.append(block_id)
                is_wrong |= left < 0
        if is_wrong:
            wrong = min(ended, key=counts.__getitem__)
            lacking = -counts[wrong]
            for block_id in block_ids:
                counts[block_id] += 1
            raise IntegrityError(
                f"block {wrong} was {verb} {lacking} times more often than it has {noun}s, "
                f"which are {counts[wrong]}"
            )
        return ended

    def _give_back(self, ended: list[int], others: list[int]) -> None:
        """Free, or keep as evictable, blocks with one counter at zero if the other is zero too."""
        cached, free = self._cached, self._free
        evictable = []
        for block_id in ended:
            if not others[block_id]:
                if cached[block_id]:
                    evictable.append(block_id)
                else:
                    free.append(block_id)
        if evictable and self._policy is not None:
            self._num_evictable += len(evictable)
            self._policy.on_evictable(evictable)

    def _check_range(self, block_ids: Sequence[int], verb: str) -> None:
        # A negative id would silently count from the end of the lists.
        if block_ids and (min(block_ids) < 0 or max(block_ids) >= self.num_blocks):
            wrong = next(i for i in block_ids if not 0 <= i < self.num_blocks)
            raise IntegrityError(
                f"block {wrong} was {verb}, but the pool has the blocks 0 to {self.num_blocks - 1}"
            )
