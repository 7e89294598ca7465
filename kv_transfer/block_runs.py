"""Which bytes one read moves: lists of block ids turned into few, long runs."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class BlockRun(NamedTuple):
    """`num_blocks` blocks from `source` on go to `target` on."""

    source: int
    target: int
    num_blocks: int


def block_runs(
    sources: Sequence[int], targets: Sequence[int], max_blocks: int
) -> Iterator[BlockRun]:
    """Join blocks that follow each other on both sides, into runs of at most `max_blocks`."""
    start, num_blocks = 0, len(sources)
    while start < num_blocks:
        source, target = sources[start], targets[start]
        limit = min(num_blocks - start, max_blocks)
        count = 1
        while (
            count < limit
            and sources[start + count] == source + count
            and targets[start + count] == target + count
        ):
            count += 1
        yield BlockRun(source, target, count)
        start += count


def find_fault(
    sources: Sequence[int],
    targets: Sequence[int],
    *,
    num_source_blocks: int,
    num_target_blocks: int,
) -> str | None:
    """Say why these blocks cannot be read, or None when they can."""
    if len(sources) != len(targets):
        return f"{len(sources)} source blocks cannot fill {len(targets)} target blocks"
    for name, ids, num_blocks in (
        ("source", sources, num_source_blocks),
        ("target", targets, num_target_blocks),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < num_blocks):
            wrong = next(block for block in ids if not 0 <= block < num_blocks)
            return f"{name} block {wrong} is outside its pool of {num_blocks} blocks"
    if len(set(targets)) != len(targets):
        return "a target block is named twice"
    return None
