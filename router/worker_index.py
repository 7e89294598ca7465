"""The workers of one role, in the order in which they are preferred. Pure.

Decode workers with the most blocks of credit are preferred, and prefill workers with the fewest
tokens to compute. A change of one worker and a choice among all cost O(log n) comparisons.
"""

import heapq
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

from paceline.router.capacity import Need, WorkerPool
from paceline.router.worker_view import Role, WorkerView

_MAX_PASSED_OVER = 32
"""Prefill workers without room that are passed over in the order of their pending tokens. Beyond
them the one with the most credit is as good."""

Rank: TypeAlias = tuple[int, int, int]
"""Smaller is better; the last number is the worker's own."""


class _Ranks(NamedTuple):
    """Where a worker stands now."""

    preference: Rank
    room: Rank
    num_sequences: int


class _Like(NamedTuple):
    """What workers of one group have in common."""

    block_tokens: int
    max_num_seqs: int
    local_prefill_tokens: int
    size: int
    """Sizes within a fifth of each other are alike: workers that measure their own memory seldom
    have the same number of blocks."""

    @classmethod
    def of(cls, pool: WorkerPool) -> "_Like":
        size = round(4 * math.log2(max(1, pool.num_blocks)))
        return cls(pool.block_tokens, pool.max_num_seqs, pool.local_prefill_tokens, size)


class _MostRoom:
    """Find the worker with the most blocks of credit among those with enough free sequences.

    A tree over numbers of free sequences: each leaf holds the workers that have exactly so many,
    each inner node the best of its subtree. Only nodes with workers are kept.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self._num_leaves = 1 << max_num_seqs.bit_length()
        self._leaves: dict[int, list[Rank]] = {}
        self._best: dict[int, Rank] = {}

    def add(self, num_sequences: int, rank: Rank) -> None:
        insort(self._leaves.setdefault(num_sequences, []), rank)
        self._mend(num_sequences)

    def remove(self, num_sequences: int, rank: Rank) -> None:
        leaf = self._leaves[num_sequences]
        del leaf[bisect_left(leaf, rank)]
        if not leaf:
            del self._leaves[num_sequences]
        self._mend(num_sequences)

    def best(self, num_sequences: int) -> Rank | None:
        """Return the best with at least so many free sequences."""
        node = self._num_leaves + num_sequences
        if node >= 2 * self._num_leaves:
            return None
        found = self._best.get(node)
        while node > 1:
            if node % 2 == 0:
                found = _better(found, self._best.get(node + 1))
            node //= 2
        return found

    def _mend(self, num_sequences: int) -> None:
        node = self._num_leaves + num_sequences
        leaf = self._leaves.get(num_sequences)
        best = leaf[0] if leaf else None
        while node:
            if best is None:
                self._best.pop(node, None)
            else:
                self._best[node] = best
            best = _better(best, self._best.get(node ^ 1))
            node //= 2


class _Group:
    """Workers alike, but for their load and a little in their size."""

    def __init__(self, like: _Like) -> None:
        self.like = like
        self._num_blocks: list[int] = []
        """Sorted, of all of them."""
        self._preferred: list[Rank] = []
        """Sorted, of those that take work and have a free sequence."""
        self._most_room = _MostRoom(like.max_num_seqs)
        self._ranks: dict[int, _Ranks] = {}
        self.views: dict[int, WorkerView] = {}

    def add(self, number: int, view: WorkerView) -> None:
        self.views[number] = view
        insort(self._num_blocks, view.pool.num_blocks)

    def remove(self, number: int) -> None:
        view = self.views.pop(number)
        del self._num_blocks[bisect_left(self._num_blocks, view.pool.num_blocks)]
        self._take_out(number)

    def update(self, number: int) -> None:
        self._take_out(number)
        view = self.views[number]
        num_sequences = min(view.credit_sequences, self.like.max_num_seqs)
        if not view.takes_work or num_sequences < 1:
            return
        room = (-view.credit_blocks, view.load.num_running, number)
        preference = room
        if view.member.role is Role.PREFILL:
            preference = (view.num_pending_tokens, -view.credit_blocks, number)
        self._ranks[number] = _Ranks(preference, room, num_sequences)
        insort(self._preferred, preference)
        self._most_room.add(num_sequences, room)

    def best(self, need: Need) -> Rank | None:
        """Return the rank of the preferred worker with room."""
        if not self._has_room(need):
            return None
        if not self._fits_all(need):
            return next(self.with_room(need), None)
        largest = self._most_room.best(need.num_choices)
        if largest is None or self.views[largest[-1]].member.role is Role.DECODE:
            return largest
        for rank in itertools.islice(self._preferred, _MAX_PASSED_OVER):
            if self.views[rank[-1]].can_take(need):
                return rank
        return self._ranks[largest[-1]].preference

    def with_room(self, need: Need) -> Iterator[Rank]:
        """Yield the ranks of workers with room, the preferred first."""
        if not self._has_room(need):
            return
        for rank in self._preferred:
            view = self.views[rank[-1]]
            if view.can_take(need) and view.could_run(need):
                yield rank

    def _has_room(self, need: Need) -> bool:
        """Whether one could have room, which is certain when the work fits all of them."""
        largest = self._most_room.best(need.num_choices)
        return largest is not None and (
            self.views[largest[-1]].can_take(need) or not self._fits_all(need)
        )

    def _fits_all(self, need: Need) -> bool:
        """Whether work fits the smallest of them, so that only their load matters."""
        if next(iter(self.views.values())).member.role is Role.PREFILL:
            return True
        smallest = self._num_blocks[0]
        pool = WorkerPool(smallest, self.like.block_tokens, self.like.max_num_seqs)
        blocks = max(pool.least_decode_blocks(need), need.decode_blocks(pool.block_tokens))
        return blocks <= smallest

    def _take_out(self, number: int) -> None:
        ranks = self._ranks.pop(number, None)
        if ranks is not None:
            del self._preferred[bisect_left(self._preferred, ranks.preference)]
            self._most_room.remove(ranks.num_sequences, ranks.room)


class WorkerIndex:
    """The workers of one role."""

    def __init__(self) -> None:
        self._groups: dict[_Like, _Group] = {}
        self._numbers: dict[str, int] = {}
        self._next_number = itertools.count()

    def add(self, view: WorkerView) -> None:
        number = next(self._next_number)
        self._numbers[view.worker_id] = number
        like = _Like.of(view.pool)
        self._groups.setdefault(like, _Group(like)).add(number, view)
        self.update(view)

    def remove(self, view: WorkerView) -> None:
        like = _Like.of(view.pool)
        group = self._groups[like]
        group.remove(self._numbers.pop(view.worker_id))
        if not group.views:
            del self._groups[like]

    def update(self, view: WorkerView) -> None:
        """Take note that its load, its credit or its reservation has changed."""
        self._groups[_Like.of(view.pool)].update(self._numbers[view.worker_id])

    def best(self, need: Need, may: Callable[[int], bool] | None = None) -> WorkerView | None:
        """Return the preferred worker with room, with a local_prefill_tokens that `may` accepts.

        Workers of one setting and about one size are one group, and all workers of a usual
        deployment. Within a group it takes O(log n), except for work that fits some of the group
        and not others, which takes O(n).
        """
        found = [
            (rank, group)
            for group in self._groups_that(may)
            if (rank := group.best(need)) is not None
        ]
        if not found:
            return None
        rank, group = min(found, key=lambda entry: entry[0])
        return group.views[rank[-1]]

    def with_room(
        self, need: Need, may: Callable[[int], bool] | None = None
    ) -> Iterator[WorkerView]:
        """Yield the workers with room, the preferred first; `may` as in `best`."""

        def of_group(group: _Group) -> Iterator[tuple[Rank, WorkerView]]:
            return ((rank, group.views[rank[-1]]) for rank in group.with_room(need))

        ordered = heapq.merge(*map(of_group, self._groups_that(may)), key=lambda entry: entry[0])
        return (view for _, view in ordered)

    def able(self, need: Need, may: Callable[[int], bool] | None = None) -> Iterator[WorkerView]:
        """Yield the workers that could run work if they had room, in no order."""
        for group in self._groups_that(may):
            for view in group.views.values():
                if not view.load.draining and view.could_run(need):
                    yield view

    def _groups_that(self, may: Callable[[int], bool] | None) -> list[_Group]:
        groups = self._groups.values()
        return [g for g in groups if may is None or may(g.like.local_prefill_tokens)]


def _better(one: Rank | None, other: Rank | None) -> Rank | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
