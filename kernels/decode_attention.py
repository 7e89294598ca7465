"""Attention of one new token a sequence over its paged context (decode).

    y[r] = softmax(q[r] K_r^T scale) V_r        K_r, V_r: the row's tokens in the pool
    q [R, num_heads, head_dim], pool kv [blocks, layers, kv_heads, 2, block_tokens, head_dim]

The CPU path neither loops over rows nor pads them to the longest context. It cuts every context
into *spans* of a few blocks and works on all spans of all rows at once:

    row 0  |span 0|span 1|sp|          gather the spans' K and V, then batched products give
    row 1  |span 3|                    each span's scores; the softmax of a row runs over its
    row 2  |span 4|span 5|             spans by a maximum and a sum over spans of one owner

When the rows are nearly of one length, one span holds a whole row and the merging falls away.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

SPAN_TOKENS = 64
"""Shorter spans pad less and cost more small products: 64 was best for contexts of 200 to 2,000."""
PADDING_FOR_WHOLE_ROWS = 1.125
"""Up to this much padding, one span a row is quicker than merging spans."""


class DecodeSpans(NamedTuple):
    """Where the rows' contexts lie: made once a step, used by every layer with the same window."""

    runs: torch.Tensor
    """int64 [2 * N * kv_heads * W], of (k|v, span, kv_head, block): row, for layer 0, of the pool
    seen as [runs, block_tokens * head_dim]."""
    mask: torch.Tensor
    """float32 [N * kv_heads, 1, W * block_tokens]: 0 where the token counts, else -inf."""
    hidden: torch.Tensor
    """int64 [H] places of the tokens that do not count, among the [2 * N * kv_heads * W *
    block_tokens] gathered keys and values. What an earlier request left there may be infinite or
    not a number, and would reach the result through a weight of 0."""
    owners: torch.Tensor | None
    """int64 [N] row of each span; None: span n is row n."""


def plan_spans(
    tables: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    kv: torch.Tensor,
    window: int | None = None,
) -> DecodeSpans:
    """Cut the rows' contexts into spans.

    tables: [R, columns] block ids; lengths: [R] tokens of the context, the new one included.
    """
    _, num_layers, num_kv_heads, _, block_tokens, _ = kv.shape
    lows = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
    first_blocks = lows // block_tokens
    num_blocks = -(-lengths // block_tokens) - first_blocks
    width = int(num_blocks.max())
    owners = None
    if width * len(lengths) > PADDING_FOR_WHOLE_ROWS * num_blocks.sum():
        width = min(width, max(1, SPAN_TOKENS // block_tokens))
        num_spans = -(-num_blocks // width)
        rows = np.repeat(np.arange(len(lengths)), num_spans)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(num_spans) - num_spans, num_spans)
        columns = (first_blocks[rows] + within * width)[:, None] + np.arange(width)
        owners = torch.from_numpy(rows)
        lows, lengths = lows[rows], lengths[rows]
        tables = tables[rows]
    else:
        columns = first_blocks[:, None] + np.arange(width)
    # A column past the context may lie past the table too; whatever block it reads is masked.
    blocks = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), axis=1)
    inside = columns * block_tokens < lengths[:, None]
    blocks = np.where(inside, blocks, 0).astype(np.int64)
    heads = np.arange(num_kv_heads)
    runs = (blocks[:, None, :] * (num_layers * num_kv_heads) + heads[None, :, None]) * 2
    positions = (columns[:, :, None] * block_tokens + np.arange(block_tokens)).reshape(
        len(blocks), -1
    )
    seen = (positions < lengths[:, None]) & (positions >= lows[:, None])
    mask = np.where(seen, np.float32(0), np.float32(-np.inf))
    mask = np.repeat(mask, num_kv_heads, axis=0)[:, None, :]
    hidden = np.flatnonzero(mask)
    return DecodeSpans(
        torch.from_numpy(np.stack((runs, runs + 1)).reshape(-1)),
        torch.from_numpy(mask),
        torch.from_numpy(np.concatenate((hidden, hidden + mask.size))),
        owners,
    )


def decode_attention(
    q: torch.Tensor, kv: torch.Tensor, layer: int, spans: DecodeSpans, scale: float
) -> torch.Tensor:
    """Return the attention output [R, num_heads, head_dim] in q's dtype; float32 inside.

    The new tokens' own keys and values must be in the pool already. kv must be contiguous.
    """
    _, _, num_kv_heads, _, block_tokens, head_dim = kv.shape
    num_rows, num_heads, _ = q.shape
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key-value heads")
    group = num_heads // num_kv_heads
    batch, _, num_tokens = spans.mask.shape
    runs = spans.runs + layer * (num_kv_heads * 2) if layer else spans.runs
    gathered = kv.view(-1, block_tokens * head_dim).index_select(0, runs)
    gathered.view(-1, head_dim).index_fill_(0, spans.hidden, 0)
    keys, values = gathered.to(torch.float32).view(2, batch, num_tokens, head_dim).unbind()
    queries = q.to(torch.float32)
    if spans.owners is not None:
        queries = queries.index_select(0, spans.owners)
    queries = queries.reshape(batch, group, head_dim)
    scores = torch.baddbmm(spans.mask, queries, keys.transpose(1, 2), alpha=scale)
    if spans.owners is None:
        output = torch.bmm(torch.softmax(scores, dim=-1), values)
    else:
        output = _merge(scores, values, spans.owners, num_rows, num_kv_heads)
    return output.view(num_rows, num_heads, head_dim).to(q.dtype)


def _merge(
    scores: torch.Tensor,
    values: torch.Tensor,
    owners: torch.Tensor,
    num_rows: int,
    num_kv_heads: int,
) -> torch.Tensor:
    """Softmax over all spans of a row, then the weighted sum of their values.

    scores: [N * kv_heads, group, tokens] -> [R * kv_heads * group, head_dim]
    """
    num_spans, group, head_dim = owners.shape[0], scores.shape[1], values.shape[2]
    maxima = scores.amax(dim=-1).view(num_spans, -1)
    of_rows = maxima.new_full((num_rows, maxima.shape[1]), -torch.inf)
    of_rows.scatter_reduce_(0, owners.view(-1, 1).expand_as(maxima), maxima, "amax")
    top = of_rows.index_select(0, owners).view(-1, group, 1)
    weights = scores.sub_(top).exp_()
    sums = maxima.new_zeros((num_rows, maxima.shape[1]))
    sums.index_add_(0, owners, weights.sum(dim=-1).view(num_spans, -1))
    parts = torch.bmm(weights, values).view(num_spans, num_kv_heads * group * head_dim)
    total = parts.new_zeros((num_rows, num_kv_heads * group * head_dim)).index_add_(
        0, owners, parts
    )
    return total.view(-1, head_dim).div_(sums.view(-1, 1))
