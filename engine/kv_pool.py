"""A worker's KV memory: how many blocks fit, and the views that kernels work on."""

import torch

from paceline.errors import CapacityError, ConfigError
from paceline.kv_layout import KvLayout

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
RESERVED_BYTES = 256 << 20
"""Left free for activations and the process itself when a pool is sized."""


class KvPool:
    """Blocks of KV in one piece of memory, which the caller owns and may share with readers."""

    def __init__(self, layout: KvLayout, blocks: torch.Tensor) -> None:
        """Take `blocks`, uint8 [num_blocks, block_bytes], contiguous."""
        if len(layout.groups) != 1 or len(layout.groups[0].planes) != 1:
            raise ConfigError(
                f"The KV layout has {len(layout.groups)} groups; one group of one plane is "
                "implemented. Use paceline.kv_layout.attention_layout."
            )
        if blocks.dtype is not torch.uint8 or list(blocks.shape[1:]) != [layout.block_bytes]:
            raise ValueError(
                f"blocks must be uint8 [n, {layout.block_bytes}], got {blocks.dtype} "
                f"{list(blocks.shape)}"
            )
        plane = layout.groups[0].planes[0]
        self.layout = layout
        self.blocks = blocks
        self.kv = blocks.view(TORCH_DTYPES[plane.dtype]).view(-1, *plane.shape)
        """[num_blocks, layers, kv_heads, k|v, block_tokens, head_dim]"""

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[0]


def num_blocks_that_fit(
    layout: KvLayout,
    *,
    num_kv_blocks: int | None,
    kv_cache_bytes: int,
    available_bytes: int,
) -> int:
    """Return how many blocks the pool gets.

    Raises CapacityError if the memory is not there, naming the largest value that is.
    """
    block_bytes = layout.block_bytes
    name = "kv_cache_bytes" if num_kv_blocks is None else "num_kv_blocks"
    count = kv_cache_bytes // block_bytes if num_kv_blocks is None else num_kv_blocks
    if count < 2:
        raise CapacityError(
            f"kv_cache_bytes is {kv_cache_bytes} bytes, and a block of {layout.block_tokens} "
            f"tokens takes {block_bytes}: a pool needs at least 2 blocks. Raise kv_cache_bytes to "
            f"at least {2 * block_bytes}, or set num_kv_blocks."
        )
    largest = max(0, available_bytes - RESERVED_BYTES) // block_bytes
    if count > largest:
        best = largest * block_bytes if num_kv_blocks is None else largest
        asked = kv_cache_bytes if num_kv_blocks is None else num_kv_blocks
        raise CapacityError(
            f"The KV pool needs {_gib(count * block_bytes)} ({name} {asked}), and "
            f"{_gib(available_bytes)} of memory is free here, of which {_gib(RESERVED_BYTES)} "
            f"stays reserved. Lower {name} to at most {best}, or run fewer workers on this machine."
        )
    return count


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
