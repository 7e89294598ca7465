"""The reader's side of a lease: which blocks to read when.

The blocks of a context of 83 tokens, 2 of them cached by the reader, after 64 tokens are final:

    block     0       1       2       3       4       5
    tokens    0–15    16–31   32–47   48–63   64–79   80–82
              cached  cached  read    read    waits   waits until the lease is complete

A full block is read once, when all its tokens are final. The partial last block is read when the
lease is
complete: until then the owner may still append to it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from paceline.errors import IntegrityError, TransferError
from paceline.request import num_blocks_for


class BlockRead(NamedTuple):
    """Copy one whole block."""

    source: int
    """Block of the owner's pool."""
    target: int
    """Block of the reader's own pool."""


class ReadPlan:
    """The reads of one attempt. Plain state, for the thread that gets the lease's updates."""

    def __init__(
        self,
        block_tokens: int,
        num_context_tokens: int,
        targets: Sequence[int],
        num_cached_blocks: int = 0,
    ) -> None:
        """targets: the reader's blocks of the context; `num_cached_blocks` are filled already."""
        num_blocks = num_blocks_for(num_context_tokens, block_tokens)
        if num_context_tokens < 1 or len(targets) != num_blocks:
            raise ValueError(
                f"a context of {num_context_tokens} tokens needs {num_blocks} blocks of "
                f"{block_tokens}, and at least one; {len(targets)} targets were given"
            )
        if not 0 <= num_cached_blocks <= num_blocks:
            raise ValueError(f"{num_cached_blocks} of {num_blocks} blocks cannot be cached")
        self._block_tokens = block_tokens
        self._num_context_tokens = num_context_tokens
        self._targets = tuple(targets)
        self._sources: list[int] = []
        self._num_tokens = 0
        self._num_started = num_cached_blocks
        """Blocks, from the start, that are cached or whose read has started."""
        self._num_running = 0
        self._is_complete = False

    @property
    def num_running(self) -> int:
        """Lists that `update` has returned and whose read has not ended."""
        return self._num_running

    @property
    def all_read(self) -> bool:
        """Whether the lease is complete and every read has ended: the time to confirm."""
        return self._is_complete and not self._num_running

    def update(
        self, block_ids_added: Sequence[int], num_tokens: int, complete: bool
    ) -> list[BlockRead]:
        """Take an update of the lease and return what may be read now, as one read; often nothing.

        Raises TransferError if the update contradicts the context or an earlier one, for it comes
        from another worker: the attempt fails, this worker goes on.
        """
        self._check(len(block_ids_added), num_tokens, complete)
        self._sources.extend(block_ids_added)
        self._num_tokens = num_tokens
        self._is_complete = complete
        end = len(self._targets) if complete else num_tokens // self._block_tokens
        reads = [
            BlockRead(self._sources[number], self._targets[number])
            for number in range(self._num_started, end)
        ]
        self._num_started = max(self._num_started, end)
        self._num_running += bool(reads)
        return reads

    def read_ended(self) -> None:
        """Note that one read, the whole list of an `update`, has ended well."""
        if not self._num_running:
            raise IntegrityError("a read ended, but none is running")
        self._num_running -= 1

    def _check(self, num_added: int, num_tokens: int, complete: bool) -> None:
        num_sources = len(self._sources) + num_added
        if self._is_complete:
            problem = "it follows the update that completed the lease"
        elif num_tokens < self._num_tokens:
            problem = f"{self._num_tokens} tokens were final before"
        elif num_tokens > self._num_context_tokens or num_sources > len(self._targets):
            problem = (
                f"the context has {self._num_context_tokens} tokens, {len(self._targets)} blocks"
            )
        elif num_tokens > num_sources * self._block_tokens:
            problem = f"a block holds {self._block_tokens} tokens"
        elif complete and num_tokens != self._num_context_tokens:
            problem = f"complete means {self._num_context_tokens} tokens"
        else:
            return
        raise TransferError(
            f"the lease's update to {num_tokens} tokens in {num_sources} blocks (complete: "
            f"{complete}) makes no sense: {problem}. Owner and reader disagree about the request"
        )
