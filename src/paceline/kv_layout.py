"""Where a token's KV lies in a pool: shared by the engine, which writes it, and KV transfer, which
moves it.

A pool is a number of blocks; a block holds the KV of `block_tokens` consecutive tokens of one
sequence, for every layer of a group. Groups exist because layers may differ (a sliding window keeps
fewer blocks); planes exist because a block may have parts of different dtype (quantised values and
their scales). Today there is one group with one plane, in the order

    [block][layer][kv_head][k|v][token][head_dim]

so that a block is one run of bytes, a layer of it one run, and a range of heads one run a layer.
"""

import hashlib
import math
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Plane:
    """One array of a block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Of one block, without the block dimension."""

    @property
    def block_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers whose blocks are allocated together."""

    layers: tuple[int, ...]
    planes: tuple[Plane, ...]
    window: int | None = None
    """Tokens that attention looks back; None: all. Blocks behind it are kept all the same, today.
    """

    @property
    def block_bytes(self) -> int:
        return sum(plane.block_bytes for plane in self.planes)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The layout of a pool, the same on every worker of a deployment."""

    block_tokens: int
    groups: tuple[KvGroup, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all groups and planes."""
        return sum(group.block_bytes for group in self.groups)

    def describe(self) -> str:
        """Say the layout in words, for error messages."""
        planes = ", ".join(
            f"{plane.name} {plane.dtype}{list(plane.shape)}"
            for group in self.groups
            for plane in group.planes
        )
        return f"{self.block_tokens} tokens a block, {planes}"

    def fingerprint(self, model_revision: str, adapter: str = "") -> bytes:
        """Digest of all that two pools must share to exchange blocks."""
        text = f"{self!r}|{model_revision}|{adapter}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


def attention_layout(
    *, num_layers: int, num_kv_heads: int, head_dim: int, block_tokens: int, dtype: str
) -> KvLayout:
    """Build the default layout of a model with keys and values of the same shape in every layer."""
    plane = Plane("kv", dtype, (num_layers, num_kv_heads, 2, block_tokens, head_dim))
    return KvLayout(block_tokens, (KvGroup(tuple(range(num_layers)), (plane,)),))
