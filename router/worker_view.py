"""What the router knows of a connected worker: its size, its last Load, and what was sent since.

A worker's credit is what its last Load says minus the dispatches that it had not counted then.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from paceline.request import AttemptKey
from paceline.router.capacity import Need, WorkerPool

_UNMEASURED_TOKENS = 2048
"""Prompt tokens that may wait at a prefill worker whose rate is not known yet: some hundred
milliseconds on a slow device, and steps of many rows on a fast one."""


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
    prefill_tokens_per_s: int = 0
    """As measured by a prefill worker; 0: not known yet."""


class _Uncounted(NamedTuple):
    number: int
    num_blocks: int
    num_sequences: int
    num_tokens: int


@dataclass(slots=True, eq=False)
class WorkerView:
    """A connected worker as the router sees it. While it is in a Placement, only that changes
    it."""

    member: WorkerMember
    pool: WorkerPool
    load: WorkerLoad
    dispatch_ahead_s: float = math.inf
    """Seconds of computing that may wait at a prefill worker when more is sent to it."""
    num_dispatched: int = 0
    """Prefill and Admit messages sent over this stream."""
    without_token: set[AttemptKey] = field(default_factory=set)
    """Attempts there whose decode worker has given no token of its own yet."""
    is_reserved: bool = False
    """Whether only a suspect may go there."""
    credit_blocks: int = field(init=False)
    credit_sequences: int = field(init=False)
    num_pending_tokens: int = field(init=False)
    has_enough_to_compute: bool = field(init=False)
    """Whether a further prompt would only queue at this prefill worker, while the decode blocks
    that are reserved for it stay idle. In the router's queue it can go to any worker."""
    _uncounted: deque[_Uncounted] = field(default_factory=deque, init=False)
    _sum: _Uncounted = field(default=_Uncounted(0, 0, 0, 0), init=False)
    """Of `_uncounted`, so that a message costs the same however many dispatches are on their way;
    its number is unused."""

    def __post_init__(self) -> None:
        self._set_credit()

    @property
    def worker_id(self) -> str:
        return self.member.worker_id

    @property
    def takes_work(self) -> bool:
        """Whether ordinary work may go there when it has room."""
        return not self.is_reserved and not self.load.draining and not self.has_enough_to_compute

    def blocks_for(self, need: Need) -> int:
        """Return the blocks of credit that work takes here at the start."""
        if self.member.role is Role.PREFILL:
            return need.prefill_blocks(self.pool.block_tokens)
        # A pool too small for the growth that a preempted request wants takes it all the same when
        # it is empty; otherwise that request would wait for ever.
        return min(need.decode_blocks(self.pool.block_tokens), self.pool.num_blocks)

    def could_run(self, need: Need) -> bool:
        """Whether it could run work when it is empty."""
        if self.member.role is Role.PREFILL:
            return self.pool.could_prefill(need)
        return self.pool.could_decode(need)

    def can_take(self, need: Need) -> bool:
        """Whether ordinary work may go there now."""
        return not self.is_reserved and not self.has_enough_to_compute and self.has_room(need)

    def has_room(self, need: Need) -> bool:
        return (
            not self.load.draining
            and self.credit_sequences >= need.num_choices
            and self.credit_blocks >= self.blocks_for(need)
        )

    def dispatch(self, need: Need, num_tokens: int) -> None:
        """Count work that is sent now, with `num_tokens` of prompt to compute here."""
        self.num_dispatched += 1
        sent = _Uncounted(self.num_dispatched, self.blocks_for(need), need.num_choices, num_tokens)
        self._uncounted.append(sent)
        self._add(sent, 1)
        self._set_credit()

    def update(self, load: WorkerLoad) -> None:
        """Take a newer Load; dispatches that it has counted no longer reduce its credit."""
        self.load = load
        while self._uncounted and self._uncounted[0].number <= load.num_dispatches_seen:
            self._add(self._uncounted.popleft(), -1)
        self._set_credit()

    def _add(self, sent: _Uncounted, sign: int) -> None:
        total = self._sum
        self._sum = _Uncounted(
            0,
            total.num_blocks + sign * sent.num_blocks,
            total.num_sequences + sign * sent.num_sequences,
            total.num_tokens + sign * sent.num_tokens,
        )

    def _set_credit(self) -> None:
        self.credit_blocks = self.load.credit_blocks - self._sum.num_blocks
        self.credit_sequences = self.load.credit_sequences - self._sum.num_sequences
        self.num_pending_tokens = self.load.num_pending_tokens + self._sum.num_tokens
        rate = self.load.prefill_tokens_per_s
        limit = rate * self.dispatch_ahead_s if rate else _UNMEASURED_TOKENS
        is_prefill = self.member.role is Role.PREFILL
        self.has_enough_to_compute = is_prefill and 0 < self.num_pending_tokens >= limit


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
        return all(worker.has_room(need) for worker in self.views)

    def could_run(self, need: Need) -> bool:
        """Whether both could run work together when they are empty."""
        if self.prefill is None and not self.decode.pool.computes_alone(need):
            return False
        return all(worker.could_run(need) for worker in self.views)
