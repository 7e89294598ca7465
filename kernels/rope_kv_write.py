"""Rotate queries and keys, norm them first where the model says so, and write keys and values to
the pool.

    qkv [T, (num_heads + 2 num_kv_heads) head_dim]: query heads, key heads, value heads
    rotated(x) = x * cos + [x2, x1] * sin        x = [x1, x2], halves of a head
    pool row (block, layer, kv_head, k|v, offset) = rotated key | value of the token

`cos` and `sin` are [T, 1, head_dim]; `sin` has its first half negated (see `rope_tables`).
"""

import torch

from paceline.kernels.rms_norm import rms_norm


def rope_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and signed sin of the tokens' angles, each [T, 1, head_dim] of `dtype`.

    positions: [T]; inverse_frequencies: float32 [head_dim / 2]; scale multiplies both.
    """
    angles = torch.outer(positions.to(torch.float32), inverse_frequencies)
    cos, sin = angles.cos().mul_(scale), angles.sin().mul_(scale)
    both_cos = torch.cat((cos, cos), dim=-1).to(dtype)
    both_sin = torch.cat((-sin, sin), dim=-1).to(dtype)
    return both_cos.unsqueeze(1), both_sin.unsqueeze(1)


def rope_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    rows: torch.Tensor,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Write the tokens' keys and values into the pool; return the rotated queries [T, num_heads,
    head_dim].

    kv: the pool, [blocks, layers, kv_heads, 2, block_tokens, head_dim], contiguous; written in
    place. rows: int64 [T * 2 * kv_heads], of (token, k|v, kv_head): row of the pool seen as [rows,
    head_dim]. `qkv` is overwritten; the queries returned are a view of it unless the model norms
    them.
    """
    num_kv_heads, head_dim = kv.shape[2], kv.shape[5]
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    if rows.shape[0] != num_tokens * 2 * num_kv_heads:
        raise ValueError(
            f"{num_tokens} tokens need {num_tokens * 2 * num_kv_heads} rows, got {rows.shape[0]}"
        )
    rotary = heads[:, : num_heads + num_kv_heads]
    if q_norm is not None and k_norm is not None:
        rotary[:, :num_heads] = rms_norm(rotary[:, :num_heads], q_norm, eps)
        rotary[:, num_heads:] = rms_norm(rotary[:, num_heads:], k_norm, eps)
    swapped = rotary.roll(head_dim // 2, dims=-1)
    rotary.mul_(cos).addcmul_(swapped, sin)
    source = heads[:, num_heads:].reshape(-1, head_dim)
    kv.view(-1, head_dim).index_copy_(0, rows, source)
    return rotary[:, :num_heads]
