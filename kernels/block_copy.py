"""Copy whole KV blocks within a pool, for copy-on-write.

blocks[targets[k]] = blocks[sources[k]]     blocks uint8 [num_blocks, block_bytes]
"""

import torch


def block_copy(blocks: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy blocks in place. No block may be both a source and a target, or a target twice.

    sources, targets: int64 [K]
    """
    if sources.shape != targets.shape or sources.dim() != 1:
        raise ValueError(
            f"sources {list(sources.shape)} and targets {list(targets.shape)} must be of one length"
        )
    blocks.index_copy_(0, targets, blocks.index_select(0, sources))
