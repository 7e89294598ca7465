"""Which workers take a request. Pure: a view of the pools and of the credit that is left there.

A worker's credit is what its last Load says minus the dispatches that it had not counted then.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from paceline.request import AttemptKey
from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, KnownPools, Need, WorkerPool
from paceline.router.route_health import RouteHealth


class Role(Enum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class WorkerMember:
    """A worker as membership names it."""

    worker_id: str
    role: Role
    incarnation: int
    address: str
    """host:port of its gRPC server"""


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """What a worker can still take, by its own last word."""

    credit_blocks: int = 0
    credit_sequences: int = 0
    num_dispatches_seen: int = 0
    """Dispatches of this stream that the credit has counted."""
    num_running: int = 0
    num_pending_tokens: int = 0
    num_free_blocks: int = 0
    draining: bool = False


class _Uncounted(NamedTuple):
    number: int
    num_blocks: int
    num_sequences: int
    num_tokens: int


@dataclass(slots=True)
class WorkerView:
    """A connected worker as the router sees it."""

    member: WorkerMember
    pool: WorkerPool
    load: WorkerLoad
    num_dispatched: int = 0
    """Prefill and Admit messages sent over this stream."""
    without_token: set[AttemptKey] = field(default_factory=set)
    """Attempts there whose decode worker has given no token of its own yet."""
    is_reserved: bool = False
    """Whether only a suspect may go there."""
    _uncounted: deque[_Uncounted] = field(default_factory=deque)

    @property
    def worker_id(self) -> str:
        return self.member.worker_id

    @property
    def credit_blocks(self) -> int:
        return self.load.credit_blocks - sum(entry.num_blocks for entry in self._uncounted)

    @property
    def credit_sequences(self) -> int:
        return self.load.credit_sequences - sum(e.num_sequences for e in self._uncounted)

    @property
    def num_pending_tokens(self) -> int:
        return self.load.num_pending_tokens + sum(entry.num_tokens for entry in self._uncounted)

    def can_take(self, num_blocks: int, num_sequences: int) -> bool:
        return not self.is_reserved and self.has_room(num_blocks, num_sequences)

    def has_room(self, num_blocks: int, num_sequences: int) -> bool:
        return (
            not self.load.draining
            and self.credit_sequences >= num_sequences
            and self.credit_blocks >= num_blocks
        )

    def dispatch(self, num_blocks: int, num_sequences: int, num_tokens: int) -> None:
        """Count a dispatch that is sent now."""
        self.num_dispatched += 1
        self._uncounted.append(
            _Uncounted(self.num_dispatched, num_blocks, num_sequences, num_tokens)
        )

    def update(self, load: WorkerLoad) -> None:
        """Take a newer Load; dispatches that it has counted no longer reduce its credit."""
        self.load = load
        while self._uncounted and self._uncounted[0].number <= load.num_dispatches_seen:
            self._uncounted.popleft()


class Pair(NamedTuple):
    """Where work goes; without a prefill worker the decode worker computes the prompt itself."""

    prefill: WorkerView | None
    decode: WorkerView

    @property
    def ids(self) -> tuple[str | None, str]:
        return None if self.prefill is None else self.prefill.worker_id, self.decode.worker_id

    @property
    def views(self) -> tuple[WorkerView, ...]:
        return (self.decode,) if self.prefill is None else (self.prefill, self.decode)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that wait where the prompt would be computed."""
        return (self.prefill or self.decode).num_pending_tokens

    @property
    def num_without_token(self) -> int:
        return sum(len(worker.without_token) for worker in self.views)

    def has_room(self, need: Need) -> bool:
        """Whether both have room for work now."""
        prefill, decode = self
        if not decode.has_room(_decode_blocks(need, decode.pool), need.num_choices):
            return False
        if prefill is None:
            return True
        return prefill.has_room(need.prefill_blocks(prefill.pool.block_tokens), need.num_choices)


class _Able(NamedTuple):
    """Workers that could run a piece of work if they had room, in some order of preference."""

    prefill: list[WorkerView]
    decode: list[WorkerView]

    @classmethod
    def of(cls, workers: Iterable[WorkerView], need: Need) -> "_Able":
        able = cls([], [])
        for worker in workers:
            if worker.load.draining:
                continue
            if worker.member.role is Role.PREFILL:
                if worker.pool.could_prefill(need):
                    able.prefill.append(worker)
            elif worker.pool.could_decode(need):
                able.decode.append(worker)
        return able

    def with_room(self, need: Need) -> "_Able":
        """Keep those that may take it now."""

        def can_take(worker: WorkerView) -> bool:
            blocks = need.prefill_blocks(worker.pool.block_tokens)
            if worker.member.role is Role.DECODE:
                blocks = _decode_blocks(need, worker.pool)
            return worker.can_take(blocks, need.num_choices)

        return _Able(list(filter(can_take, self.prefill)), list(filter(can_take, self.decode)))

    def usual_pairs(self, need: Need) -> Iterator[Pair]:
        """Yield decode workers that compute the context themselves, then all pairs."""
        for decode in self.decode:
            if decode.pool.computes_alone(need) and not _leaves_prompts_to_others(decode):
                yield Pair(None, decode)
        for prefill in self.prefill:
            for decode in self.decode:
                yield Pair(prefill, decode)

    def fallback_pairs(self) -> Iterator[Pair]:
        """Yield decode workers that compute what no prefill worker can."""
        return (Pair(None, decode) for decode in self.decode if _leaves_prompts_to_others(decode))

    def all_pairs(self, need: Need) -> Iterator[Pair]:
        return itertools.chain(self.usual_pairs(need), self.fallback_pairs())


class Placement:
    """The connected workers, and the choice among them."""

    def __init__(self, routes: RouteHealth | None = None) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.pools = KnownPools()
        self.routes = routes or RouteHealth()
        self._reserved: Pair | None = None

    def add(self, worker: WorkerView) -> None:
        self.workers[worker.worker_id] = worker
        is_prefill = worker.member.role is Role.PREFILL
        known = self.pools.prefill if is_prefill else self.pools.decode
        known[worker.worker_id] = worker.pool

    def remove(self, worker_id: str) -> WorkerView | None:
        """Take a worker out; one that was draining is not expected to come back."""
        worker = self.workers.pop(worker_id, None)
        self.routes.forget(worker_id)
        if worker is not None and worker.load.draining:
            self.pools.forget(worker_id)
        return worker

    def of_role(self, role: Role) -> list[WorkerView]:
        return [worker for worker in self.workers.values() if worker.member.role is role]

    @property
    def can_serve(self) -> bool:
        """Whether some prompt could be computed and decoded by the connected workers."""
        decoders = [w for w in self.of_role(Role.DECODE) if not w.load.draining]
        prefillers = [w for w in self.of_role(Role.PREFILL) if not w.load.draining]
        return bool(decoders) and (
            bool(prefillers) or any(w.pool.local_prefill_tokens > 0 for w in decoders)
        )

    def find(self, need: Need) -> Pair | None:
        """Pick the workers for work, or None when none have room now, or soon will have."""
        pair = self._find(need)
        if pair is None or not self.routes.is_resting(*pair.ids):
            return pair
        return self._find_around_rests(need)

    def _find(self, need: Need) -> Pair | None:
        decoders = [
            worker
            for worker in self.of_role(Role.DECODE)
            if worker.pool.could_decode(need)
            and worker.can_take(_decode_blocks(need, worker.pool), need.num_choices)
        ]
        if not decoders:
            return None
        prefillers = self.of_role(Role.PREFILL)
        local = [worker for worker in decoders if _computes_alone(worker, need, prefillers)]
        if local:
            return Pair(None, max(local, key=_room))
        able = [
            worker
            for worker in prefillers
            if worker.can_take(need.prefill_blocks(worker.pool.block_tokens), need.num_choices)
        ]
        if not able:
            return None
        prefill = min(able, key=lambda worker: (worker.num_pending_tokens, -worker.credit_blocks))
        return Pair(prefill, max(decoders, key=_room))

    def reserve(self, need: Need) -> Pair | None:
        """Keep new work away from a pair; return the pair when it has room and nothing there is
        without a token. `release` ends it."""
        pair = self._reserved
        if pair is None or not self._could_run(pair, need):
            self.release()
            able = _Able.of(self.workers.values(), need)
            able.prefill.sort(key=_time_until_quiet)
            able.decode.sort(key=_time_until_quiet)
            pair = self._first_well(able.all_pairs(need)) or next(able.all_pairs(need), None)
            if pair is None:
                return None
            self._reserved = pair
            for worker in pair.views:
                worker.is_reserved = True
        return pair if pair.has_room(need) and not pair.num_without_token else None

    def _could_run(self, pair: Pair, need: Need) -> bool:
        """Whether a pair that was picked earlier is one to wait for still."""
        live = all(
            self.workers.get(worker.worker_id) is worker and not worker.load.draining
            for worker in pair.views
        )
        prefill, decode = pair
        return (
            live
            and not self.routes.is_resting(*pair.ids)
            and decode.pool.could_decode(need)
            and (
                decode.pool.computes_alone(need)
                if prefill is None
                else prefill.pool.could_prefill(need)
            )
        )

    def release(self) -> None:
        """Let new work go everywhere."""
        if self._reserved is not None:
            for worker in self._reserved.views:
                worker.is_reserved = False
            self._reserved = None

    def _find_around_rests(self, need: Need) -> Pair | None:
        """Pick a pair that does not rest; wait for its room rather than take one that does.

        Decode workers that leave prompts to others compute them when every other way rests, and
        only without any other way is a resting pair used.
        """
        every = _Able.of(self.workers.values(), need)
        every.prefill.sort(key=lambda worker: (worker.num_pending_tokens, -worker.credit_blocks))
        every.decode.sort(key=_room, reverse=True)
        free = every.with_room(need)
        for pairs, free_pairs in (
            (every.usual_pairs(need), free.usual_pairs(need)),
            (every.fallback_pairs(), free.fallback_pairs()),
        ):
            pair = self._first_well(free_pairs)
            if pair is not None or self._first_well(pairs) is not None:
                return pair
        return min(
            free.all_pairs(need),
            key=lambda pair: self.routes.num_failures(*pair.ids),
            default=None,
        )

    def _first_well(self, pairs: Iterable[Pair]) -> Pair | None:
        return next((pair for pair in pairs if not self.routes.is_resting(*pair.ids)), None)

    def dispatch(self, pair: Pair, need: Need) -> None:
        """Count work that is sent to the pair now against their credit."""
        self.routes.sent(*pair.ids)
        decode = pair.decode
        pending = need.num_tokens if pair.prefill is None else 0
        decode.dispatch(_decode_blocks(need, decode.pool), need.num_choices, pending)
        if pair.prefill is not None:
            blocks = need.prefill_blocks(pair.prefill.pool.block_tokens)
            pair.prefill.dispatch(blocks, need.num_choices, need.num_tokens)


def _decode_blocks(need: Need, pool: WorkerPool) -> int:
    # A pool too small for the growth that a preempted request wants takes it all the same when it
    # is empty; otherwise that request would wait for ever.
    return min(need.decode_blocks(pool.block_tokens), pool.num_blocks)


def _computes_alone(worker: WorkerView, need: Need, prefillers: list[WorkerView]) -> bool:
    """Whether a decode worker with room should compute the context itself."""
    if _leaves_prompts_to_others(worker):
        # Beside prefill workers it is left to them, but for what is too large for each of them.
        return not any(
            not prefiller.load.draining and prefiller.pool.could_prefill(need)
            for prefiller in prefillers
        )
    return worker.pool.computes_alone(need)


def _leaves_prompts_to_others(worker: WorkerView) -> bool:
    return worker.pool.local_prefill_tokens == UNLIMITED_LOCAL_PREFILL


def _time_until_quiet(worker: WorkerView) -> tuple[int, int]:
    """Order workers by how soon a suspect may run there."""
    return len(worker.without_token), -worker.credit_blocks


def _room(worker: WorkerView) -> tuple[int, int]:
    return worker.credit_blocks, -worker.load.num_running
