"""What could ever run where, by the size of the workers alone; how busy they are does not matter
here. Pure."""

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

    def _holds(self, need: Need, num_blocks: int) -> bool:
        return num_blocks <= self.num_blocks and need.num_choices <= self.max_num_seqs


class KnownPools:
    """The last known size of each worker by its name: of the connected, and of those that died,
    whose replacements are expected to be like them."""

    def __init__(self) -> None:
        self.prefill: dict[str, WorkerPool] = {}
        self.decode: dict[str, WorkerPool] = {}

    def forget(self, worker_id: str) -> None:
        """Note that nobody is expected under this name."""
        self.prefill.pop(worker_id, None)
        self.decode.pop(worker_id, None)

    def why_too_large(self, need: Need) -> str | None:
        """Say why nobody could ever take work; None: someone could, or nobody is known yet."""
        if not self.decode:
            return None  # for all that is known, decode workers may compute prompts themselves
        decoders = [pool for pool in self.decode.values() if pool.could_decode(need)]
        if not decoders:
            return _shortage("decode", self.decode.values(), need, WorkerPool.least_decode_blocks)
        if any(pool.computes_alone(need) for pool in decoders) or not self.prefill:
            return None
        if any(pool.could_prefill(need) for pool in self.prefill.values()):
            return None
        return _shortage("prefill", self.prefill.values(), need, WorkerPool.least_prefill_blocks)

    def max_context_tokens(self) -> int | None:
        """Return the length of the longest context with which a choice could start or resume; None
        while no decode worker is known."""
        computed_elsewhere = max(
            (pool.num_blocks * pool.block_tokens for pool in self.prefill.values()), default=None
        )
        longest: int | None = None
        for pool in self.decode.values():
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
