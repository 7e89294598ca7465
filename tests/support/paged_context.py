"""Sequences in a paged pool, and attention over them written the plain way."""

from typing import NamedTuple

import numpy as np
import torch


class Paged(NamedTuple):
    kv: torch.Tensor
    """[blocks, layers, kv_heads, 2, block_tokens, head_dim]"""
    tables: np.ndarray
    """int32 [sequences, columns]"""
    keys: list[torch.Tensor]
    """Of each sequence, of LAYER: [tokens, kv_heads, head_dim]"""
    values: list[torch.Tensor]


LAYER = 1
NUM_LAYERS = 2


def make_paged(
    lengths: list[int], *, kv_heads: int, head_dim: int, block_tokens: int, dtype: torch.dtype
) -> Paged:
    """Scatter random sequences over a pool that is otherwise full of what is not a number."""
    torch.manual_seed(sum(lengths))
    columns = max(-(-length // block_tokens) for length in lengths)
    num_blocks = columns * len(lengths) + 1
    shape = (num_blocks, NUM_LAYERS, kv_heads, 2, block_tokens, head_dim)
    kv = torch.full(shape, torch.nan, dtype=dtype)
    order = np.random.default_rng(0).permutation(num_blocks)[: columns * len(lengths)]
    tables = order.reshape(len(lengths), columns).astype(np.int32)
    keys = [torch.randn(length, kv_heads, head_dim).to(dtype) for length in lengths]
    values = [torch.randn(length, kv_heads, head_dim).to(dtype) for length in lengths]
    for table, k, v in zip(tables, keys, values, strict=True):
        for position in range(len(k)):
            block = kv[int(table[position // block_tokens]), LAYER]
            block[:, 0, position % block_tokens] = k[position]
            block[:, 1, position % block_tokens] = v[position]
    return Paged(kv, tables, keys, values)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, scale: float
) -> torch.Tensor:
    """Attention of a sequence's last tokens: q [n, heads, d], k and v [t, kv_heads, d]."""
    group = q.shape[1] // k.shape[1]
    k = k.float().repeat_interleave(group, dim=1)
    v = v.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("nhd,thd->hnt", q.float(), k) * scale
    new = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
    old = torch.arange(len(k))
    hidden = old > new
    if window is not None:
        hidden |= old <= new - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hnt,thd->nhd", weights, v)
