"""What could ever run where, by the size of the workers alone; how busy they are does not matter
here. Pure."""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from paceline.request import num_blocks_for, num_blocks_promised

UNLIMITED_LOCAL_PREFILL = 2**32 - 1
"""`Welcome.local_prefill_tokens` of a worker that computes prompts of any length itself."""

PREEMPTION_GROWTH_BLOCKS = 4
"""Growth blocks a choice that a preempted request needs to come back, so that it is not preempted
again at once; others need one."""


class Need(NamedTuple):
    """What a piece of work needs to start and to end."""

    num_tokens: int
    """Prompt and output so far"""
    num_choices: int
    num_growth_tokens: int = 0
    """Tokens that a choice may add to those before its last one"""
    preempted: bool = False

    def decode_blocks(self, block_tokens: int) -> int:
        """Blocks that a decode worker promises: the context and room to grow."""
        promised = num_blocks_promised(self.num_tokens, self.num_choices, block_tokens)
        extra = (PREEMPTION_GROWTH_BLOCKS - 1) * self.num_choices if self.preempted else 0
        return promised + extra

    def prefill_blocks(self, block_tokens: int) -> int:
        return num_blocks_for(self.num_tokens, block_tokens)


@dataclass(frozen=True, slots=True)
class WorkerPool:
    """What does not change while a worker lives."""

    num_blocks: int
    block_tokens: int
    max_num_seqs: int
    """Sequences that run at once; a request is as many as it has choices."""
    local_prefill_tokens: int = 0

    def least_decode_blocks(self, need: Need) -> int:
        """Blocks without which a decode worker refuses work even when it is empty."""
        start = need._replace(preempted=False).decode_blocks(self.block_tokens)
        end = num_blocks_for(need.num_tokens + need.num_growth_tokens, self.block_tokens)
        return max(start, end)

    def least_prefill_blocks(self, need: Need) -> int:
        """Blocks without which a prefill worker refuses work even when it is empty."""
        return need.prefill_blocks(self.block_tokens)

    def could_decode(self, need: Need) -> bool:
        """Whether a decode worker of this size could run work when it is empty."""
        return self._holds(need, self.least_decode_blocks(need))

    def could_prefill(self, need: Need) -> bool:
        """Whether a prefill worker of this size could compute work when it is empty."""
        return self._holds(need, self.least_prefill_blocks(need))

    def computes_alone(self, need: Need) -> bool:
        """Whether a decode worker with this setting may compute the context itself."""
        return need.num_tokens <= self.local_prefill_tokens

    def covers(self, other: "WorkerPool") -> bool:
        """Whether it can run all that another can."""
        return (
            self.block_tokens == other.block_tokens
            and self.num_blocks >= other.num_blocks
            and self.max_num_seqs >= other.max_num_seqs
            and self.local_prefill_tokens >= other.local_prefill_tokens
        )

    def _holds(self, need: Need, num_blocks: int) -> bool:
        return num_blocks <= self.num_blocks and need.num_choices <= self.max_num_seqs


class PoolSizes:
    """Sizes of workers by name, and the largest of them.

    What none of the largest can run nobody can, so that a question costs the same however many
    workers there are. They are found anew after a change, once and among the different sizes.
    """

    def __init__(self) -> None:
        self._pools: dict[str, WorkerPool] = {}
        self._counts: Counter[WorkerPool] = Counter()
        self._largest: tuple[WorkerPool, ...] | None = None

    def put(self, worker_id: str, pool: WorkerPool) -> None:
        if self._pools.get(worker_id) != pool:
            self.discard(worker_id)
            self._pools[worker_id] = pool
            self._counts[pool] += 1
            self._largest = None if self._counts[pool] == 1 else self._largest

    def discard(self, worker_id: str) -> None:
        pool = self._pools.pop(worker_id, None)
        if pool is not None:
            self._counts[pool] -= 1
            if not self._counts[pool]:
                del self._counts[pool]
                self._largest = None

    @property
    def largest(self) -> tuple[WorkerPool, ...]:
        """Those that no other exceeds in every respect."""
        if self._largest is None:
            largest: list[WorkerPool] = []
            for pool in sorted(self._counts, key=lambda pool: pool.num_blocks, reverse=True):
                if not any(other.covers(pool) for other in largest):
                    largest = [other for other in largest if not pool.covers(other)]
                    largest.append(pool)
            self._largest = tuple(largest)
        return self._largest


class KnownPools:
    """The last known size of each worker by its name: of the connected, and of those that died,
    whose replacements are expected to be like them."""

    def __init__(self) -> None:
        self.prefill = PoolSizes()
        self.decode = PoolSizes()

    def forget(self, worker_id: str) -> None:
        """Note that nobody is expected under this name."""
        self.prefill.discard(worker_id)
        self.decode.discard(worker_id)

    def why_too_large(self, need: Need) -> str | None:
        """Say why nobody could ever take work; None: someone could, or nobody is known yet."""
        prefill, decode = self.prefill.largest, self.decode.largest
        if not decode:
            return None  # for all that is known, decode workers may compute prompts themselves
        decoders = [pool for pool in decode if pool.could_decode(need)]
        if not decoders:
            return _shortage("decode", decode, need, WorkerPool.least_decode_blocks)
        if any(pool.computes_alone(need) for pool in decoders) or not prefill:
            return None
        if any(pool.could_prefill(need) for pool in prefill):
            return None
        return _shortage("prefill", prefill, need, WorkerPool.least_prefill_blocks)

    def max_context_tokens(self) -> int | None:
        """Return the length of the longest context with which a choice could start or resume; None
        while no decode worker is known."""
        computed_elsewhere = max(
            (pool.num_blocks * pool.block_tokens for pool in self.prefill.largest), default=None
        )
        longest: int | None = None
        for pool in self.decode.largest:
            length = (pool.num_blocks - 1) * pool.block_tokens  # beside a block to grow
            if computed_elsewhere is not None:
                length = min(length, max(computed_elsewhere, pool.local_prefill_tokens))
            longest = length if longest is None else max(longest, length)
        return longest


def _shortage(
    role: str,
    pools: Collection[WorkerPool],
    need: Need,
    blocks: Callable[[WorkerPool, Need], int],
) -> str:
    widest = max(pool.max_num_seqs for pool in pools)
    if need.num_choices > widest:
        return (
            f"{need.num_choices} choices are as many sequences, and a {role} worker runs at most "
            f"{widest} at once; lower n or raise {role}.max_num_seqs"
        )
    wide = [pool for pool in pools if pool.max_num_seqs >= need.num_choices]
    largest = max(wide, key=lambda pool: pool.num_blocks)
    return (
        f"{need.num_tokens + need.num_growth_tokens} tokens in {need.num_choices} choice(s) need "
        f"{blocks(largest, need)} KV blocks of {largest.block_tokens} tokens, and the largest "
        f"{role} worker has {largest.num_blocks}; shorten the prompt, lower max_tokens or n, or "
        f"raise {role}.num_kv_blocks"
    )
