"""Which workers take a request. Pure: a view of the pools and of the credit that is left there.

A worker's credit is what its last Load says minus the dispatches that it had not counted then.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from paceline.request import num_blocks_for, num_blocks_promised

UNLIMITED_LOCAL_PREFILL = 2**32 - 1
"""`Welcome.local_prefill_tokens` of a worker that computes prompts of any length itself."""

PREEMPTION_GROWTH_BLOCKS = 4
"""Growth blocks a choice that a preempted request needs to come back, so that it is not preempted
again at once; others need one."""


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
    credit_requests: int = 0
    num_dispatches_seen: int = 0
    """Dispatches of this stream that the credit has counted."""
    num_running: int = 0
    num_pending_tokens: int = 0
    num_free_blocks: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """What does not change while a worker lives."""

    num_blocks: int
    block_tokens: int
    local_prefill_tokens: int = 0


class _Uncounted(NamedTuple):
    number: int
    num_blocks: int
    num_tokens: int


@dataclass(slots=True)
class WorkerView:
    """A connected worker as the router sees it."""

    member: WorkerMember
    pool: WorkerPool
    load: WorkerLoad
    num_dispatched: int = 0
    """Prefill and Admit messages sent over this stream."""
    _uncounted: deque[_Uncounted] = field(default_factory=deque)

    @property
    def worker_id(self) -> str:
        return self.member.worker_id

    @property
    def credit_blocks(self) -> int:
        return self.load.credit_blocks - sum(entry.num_blocks for entry in self._uncounted)

    @property
    def credit_requests(self) -> int:
        return self.load.credit_requests - len(self._uncounted)

    @property
    def num_pending_tokens(self) -> int:
        return self.load.num_pending_tokens + sum(entry.num_tokens for entry in self._uncounted)

    def can_take(self, num_blocks: int) -> bool:
        return (
            not self.load.draining and self.credit_requests > 0 and self.credit_blocks >= num_blocks
        )

    def dispatch(self, num_blocks: int, num_tokens: int) -> None:
        """Count a dispatch that is sent now."""
        self.num_dispatched += 1
        self._uncounted.append(_Uncounted(self.num_dispatched, num_blocks, num_tokens))

    def update(self, load: WorkerLoad) -> None:
        """Take a newer Load; dispatches that it has counted no longer reduce its credit."""
        self.load = load
        while self._uncounted and self._uncounted[0].number <= load.num_dispatches_seen:
            self._uncounted.popleft()


class Need(NamedTuple):
    """What a piece of work needs to start."""

    num_tokens: int
    """Prompt and output so far"""
    num_choices: int
    preempted: bool = False

    def decode_blocks(self, block_tokens: int) -> int:
        """Blocks that a decode worker promises: the context and room to grow."""
        promised = num_blocks_promised(self.num_tokens, self.num_choices, block_tokens)
        extra = (PREEMPTION_GROWTH_BLOCKS - 1) * self.num_choices if self.preempted else 0
        return promised + extra

    def prefill_blocks(self, block_tokens: int) -> int:
        return num_blocks_for(self.num_tokens, block_tokens)


class Pair(NamedTuple):
    """Where work goes; without a prefill worker the decode worker computes the prompt itself."""

    prefill: WorkerView | None
    decode: WorkerView


class Placement:
    """The connected workers, and the choice among them."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerView] = {}
        self._largest: dict[Role, WorkerPool] = {}

    def add(self, worker: WorkerView) -> None:
        self.workers[worker.worker_id] = worker
        largest = self._largest.get(worker.member.role)
        if largest is None or worker.pool.num_blocks > largest.num_blocks:
            self._largest[worker.member.role] = worker.pool

    def remove(self, worker_id: str) -> WorkerView | None:
        return self.workers.pop(worker_id, None)

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
        """Pick the workers for work, or None when none have room now."""
        decoders = [
            worker
            for worker in self.of_role(Role.DECODE)
            if worker.can_take(self._decode_blocks(need, worker))
        ]
        if not decoders:
            return None
        prefillers = self.of_role(Role.PREFILL)
        local = [worker for worker in decoders if _computes_alone(worker, need, prefillers)]
        if local:
            return Pair(None, max(local, key=_room))
        able = [w for w in prefillers if w.can_take(need.prefill_blocks(w.pool.block_tokens))]
        if not able:
            return None
        prefill = min(able, key=lambda worker: (worker.num_pending_tokens, -worker.credit_blocks))
        return Pair(prefill, max(decoders, key=_room))

    def dispatch(self, pair: Pair, need: Need) -> None:
        """Count work that is sent to the pair now against their credit."""
        decode = pair.decode
        pending = need.num_tokens if pair.prefill is None else 0
        decode.dispatch(self._decode_blocks(need, decode), pending)
        if pair.prefill is not None:
            blocks = need.prefill_blocks(pair.prefill.pool.block_tokens)
            pair.prefill.dispatch(blocks, need.num_tokens)

    def why_too_large(
        self, num_prompt_tokens: int, num_choices: int, max_tokens: int
    ) -> str | None:
        """Say why no pool seen so far could ever run a request; None when one can or none is
        known."""
        decode = self._largest.get(Role.DECODE)
        if decode is not None:
            # All choices must fit at their start, and each alone when it resumes before its last
            # token.
            first = Need(num_prompt_tokens, num_choices)
            last = Need(num_prompt_tokens + max_tokens - 1, 1)
            blocks = max(
                first.decode_blocks(decode.block_tokens), last.decode_blocks(decode.block_tokens)
            )
            if blocks > decode.num_blocks:
                return (
                    f"{num_prompt_tokens} prompt and up to {max_tokens} output tokens of "
                    f"{num_choices} choice(s) need {blocks} KV blocks of {decode.block_tokens} "
                    f"tokens, and the largest decode worker has {decode.num_blocks}; shorten the "
                    "prompt, lower max_tokens or n, or raise decode.num_kv_blocks"
                )
        prefill = self._largest.get(Role.PREFILL)
        if prefill is not None and (
            decode is None or decode.local_prefill_tokens < num_prompt_tokens
        ):
            blocks = num_blocks_for(num_prompt_tokens, prefill.block_tokens)
            if blocks > prefill.num_blocks:
                return (
                    f"{num_prompt_tokens} prompt tokens need {blocks} KV blocks of "
                    f"{prefill.block_tokens} tokens, and the largest prefill worker has "
                    f"{prefill.num_blocks}; shorten the prompt or raise prefill.num_kv_blocks"
                )
        return None

    def max_decode_tokens(self) -> int | None:
        """Tokens of a sequence that the largest decode pool can hold beside a growth block.

        None while no pool is known.
        """
        decode = self._largest.get(Role.DECODE)
        return None if decode is None else (decode.num_blocks - 1) * decode.block_tokens

    def _decode_blocks(self, need: Need, worker: WorkerView) -> int:
        # A pool too small for the growth that a preempted request wants takes it all the same when
        # it is empty; otherwise that request would wait for ever.
        return min(need.decode_blocks(worker.pool.block_tokens), _most(need, worker.pool))


def _most(need: Need, pool: WorkerPool) -> int:
    bare = Need(need.num_tokens, need.num_choices).decode_blocks(pool.block_tokens)
    return max(bare, pool.num_blocks)


def _computes_alone(worker: WorkerView, need: Need, prefillers: list[WorkerView]) -> bool:
    limit = worker.pool.local_prefill_tokens
    if limit == UNLIMITED_LOCAL_PREFILL:
        return not any(not prefiller.load.draining for prefiller in prefillers)
    return need.num_tokens <= limit


def _room(worker: WorkerView) -> tuple[int, int]:
    return worker.credit_blocks, -worker.load.num_running
