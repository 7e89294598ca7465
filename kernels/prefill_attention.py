"""Causal attention of a chunk of new tokens over the sequence's paged context (prefill).

    y[i] = softmax(q[i] K[:start + i + 1]^T scale) V[:start + i + 1]        i = 0 .. n - 1
    q [n, num_heads, head_dim], pool kv [blocks, layers, kv_heads, 2, block_tokens, head_dim]

The chunk follows `start` tokens whose keys and values the pool holds already: earlier chunks, or a
cached prefix. One sequence a call, because each is large work.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F


class PrefillContext(NamedTuple):
    """Where a sequence's context lies: made once a step, used by every layer of one window."""

    runs: torch.Tensor
    """int64 [2 * kv_heads * blocks], of (k|v, kv_head, block): row, for layer 0, of the pool seen
    as [runs, block_tokens * head_dim]."""
    num_tokens: int
    """Tokens of the context from its first block that counts, the new ones included."""
    mask: torch.Tensor | None
    """[n, num_tokens] added to the scores; None: plainly causal, without a prefix."""


def plan_context(
    table: npt.NDArray[np.int32],
    start: int,
    num_new: int,
    kv: torch.Tensor,
    window: int | None = None,
) -> PrefillContext:
    """Prepare one sequence's chunk.

    table: [columns] block ids of the sequence.
    """
    _, num_layers, num_kv_heads, _, block_tokens, _ = kv.shape
    end = start + num_new
    first_block = 0 if window is None else max(0, start - window + 1) // block_tokens
    blocks = table[first_block : -(-end // block_tokens)].astype(np.int64)
    heads = np.arange(num_kv_heads)[:, None]
    runs = (blocks[None, :] * (num_layers * num_kv_heads) + heads) * 2
    base = first_block * block_tokens
    mask = None
    if start > 0 or (window is not None and window < num_new):
        positions = torch.arange(base, end)
        new = torch.arange(start, end).unsqueeze(1)
        hidden = positions > new
        if window is not None:
            hidden |= positions <= new - window
        mask = torch.zeros(num_new, end - base, dtype=kv.dtype).masked_fill_(hidden, -torch.inf)
    return PrefillContext(
        torch.from_numpy(np.stack((runs, runs + 1)).reshape(-1)), end - base, mask
    )


def prefill_attention(
    q: torch.Tensor, kv: torch.Tensor, layer: int, context: PrefillContext, scale: float
) -> torch.Tensor:
    """Return the attention output [n, num_heads, head_dim].

    The chunk's own keys and values must be in the pool already. kv must be contiguous.
    """
    _, _, num_kv_heads, _, block_tokens, head_dim = kv.shape
    num_new, num_heads, _ = q.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads")
    group = num_heads // num_kv_heads
    runs = context.runs + layer * (num_kv_heads * 2)
    gathered = kv.view(-1, block_tokens * head_dim).index_select(0, runs)
    # The query heads of a key-value head are one batch entry; its keys are shared without a copy.
    shared = gathered.view(2, num_kv_heads, 1, -1, head_dim)[:, :, :, : context.num_tokens]
    keys, values = shared.expand(-1, -1, group, -1, -1).unbind()
    queries = q.view(num_new, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    output = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=context.mask,
        is_causal=context.mask is None,
        scale=scale,
    )
    return output.permute(2, 0, 1, 3).reshape(num_new, num_heads, head_dim)
