"""Which work fits: promises of blocks, reasons to refuse, and the credit of routers.

A promise covers the context, a growth block for each choice, and the copies of a partial last block
that all choices but one will make. So what has been admitted can always start. Growth beyond it
takes blocks that are promised to nobody.
"""

from dataclasses import dataclass

from paceline.engine.block_allocator import BlockAllocator
from paceline.errors import IntegrityError
from paceline.request import Work, num_blocks_for, num_blocks_promised


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a decode worker; see DecodeSettings."""

    block_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    local_prefill_tokens: int | None
    """Longest uncached context computed here; None: any."""
    watermark_blocks: int
    promise_ttl_s: float
    prefill_age_bound_s: float
    max_model_len: int


class BlockBudget:
    """The pool's blocks, less those that have been promised."""

    def __init__(self, allocator: BlockAllocator) -> None:
        self._allocator = allocator
        self.num_promised = 0

    @property
    def num_spare(self) -> int:
        """Blocks that can be allocated and are promised to nobody."""
        return self._allocator.num_available - self.num_promised

    def promise(self, count: int) -> None:
        """Set blocks aside, or take promises back where `count` is negative."""
        self.num_promised += count

    def allocate(self, count: int, num_promised: int) -> list[int]:
        """Take blocks, of which `num_promised` had been set aside."""
        block_ids = self._allocator.allocate(count)
        self.num_promised -= num_promised
        return block_ids

    def check_integrity(self, expected: int) -> None:
        if self.num_promised != expected:
            raise IntegrityError(
                f"{self.num_promised} blocks are counted as promised, sequences have {expected}"
            )


def num_promised_beyond_context(num_tokens: int, num_choices: int, block_tokens: int) -> int:
    """Blocks promised for growth and copies, beside those that the context takes at once."""
    if not num_choices:
        return 0
    promised = num_blocks_promised(num_tokens, num_choices, block_tokens)
    return promised - num_blocks_for(num_tokens, block_tokens)


def reason_never_to_admit(
    work: Work, max_output_tokens: int, num_blocks: int, limits: Limits
) -> str | None:
    """Say why a worker that runs nothing else could not take the work either."""
    if not len(work.prompt):
        return "the prompt is empty"
    if len(work.output) and len(work.choices) != 1:
        return f"output so far belongs to one choice, the work has {len(work.choices)}"
    if work.num_tokens >= limits.max_model_len:
        return (
            f"{work.num_tokens} tokens leave no room for another one: the model's length, "
            f"model.max_model_len, is {limits.max_model_len}"
        )
    if work.next_index >= max_output_tokens:
        return f"{work.next_index} output tokens are there, at most {max_output_tokens} are wanted"
    if len(work.choices) > limits.max_num_seqs:
        return (
            f"{len(work.choices)} choices are as many sequences, {limits.max_num_seqs} may run. "
            "Raise decode.max_num_seqs or lower n"
        )
    promised = num_blocks_promised(work.num_tokens, len(work.choices), limits.block_tokens)
    longest = num_blocks_for(len(work.prompt) + max_output_tokens - 1, limits.block_tokens)
    if max(promised, longest) > num_blocks:
        return (
            f"{len(work.prompt)} prompt tokens, {max_output_tokens} output tokens and "
            f"{len(work.choices)} choices need {max(promised, longest)} KV blocks of "
            f"{limits.block_tokens} tokens, the pool has {num_blocks}. Raise decode.num_kv_blocks "
            "or lower max_tokens or n"
        )
    return None


def num_blocks_to_commit(
    num_spare: int, num_running: int, watermark_blocks: int, *, is_empty: bool
) -> int:
    """Blocks that new work may commit: one for each running sequence and the watermark stay free.

    An empty worker gives all it has, so that every request that fits into the pool gets in at last.
    """
    if is_empty:
        return max(num_spare, 0)
    return max(num_spare - num_running - watermark_blocks, 0)
