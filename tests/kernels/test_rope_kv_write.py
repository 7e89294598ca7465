"""Rotation as transformers does it, and keys and values in the pool where they belong."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from paceline.kernels.rope_kv_write import rope_kv_write, rope_tables

HEADS, KV_HEADS, HEAD_DIM, BLOCK_TOKENS = 4, 2, 16, 8
FREQUENCIES = 1.0 / 1000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def make_qkv(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(num_tokens)
    return torch.randn(num_tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(dtype)


def reference(
    qkv: torch.Tensor, positions: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[tokens, heads, head_dim] of rotated queries, rotated keys, values."""
    sizes = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM]
    q, k, v = (part.view(1, len(qkv), -1, HEAD_DIM) for part in qkv.split(sizes, dim=-1))
    angles = torch.cat((torch.outer(positions.float(), FREQUENCIES),) * 2, dim=-1)
    cos, sin = (angles.cos() * scale).to(qkv.dtype), (angles.sin() * scale).to(qkv.dtype)
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None], unsqueeze_dim=2)
    return q[0], k[0], v[0]


def rows_of(slots: torch.Tensor) -> torch.Tensor:
    """Rows, for the only layer, of tokens in the given slots of the pool."""
    blocks, offsets = slots // BLOCK_TOKENS, slots % BLOCK_TOKENS
    runs = (blocks[:, None, None] * KV_HEADS + torch.arange(KV_HEADS)) * 2
    runs = runs + torch.arange(2)[None, :, None]
    return (runs * BLOCK_TOKENS + offsets[:, None, None]).reshape(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 19])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_equals_transformers_rotation(
    num_tokens: int, scale: float, dtype: torch.dtype, tolerance: float
) -> None:
    qkv = make_qkv(num_tokens, dtype)
    positions = torch.randperm(500)[:num_tokens]
    slots = torch.randperm(64)[:num_tokens]
    q, k, v = reference(qkv, positions, scale)
    kv = torch.zeros(8, 1, KV_HEADS, 2, BLOCK_TOKENS, HEAD_DIM, dtype=dtype)
    cos, sin = rope_tables(positions, FREQUENCIES, scale, dtype)
    queries = rope_kv_write(qkv.clone(), cos, sin, kv, rows_of(slots), num_heads=HEADS)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(queries, q, **close)
    written = kv[slots // BLOCK_TOKENS, 0, :, :, slots % BLOCK_TOKENS]
    torch.testing.assert_close(written[:, :, 0], k, **close)
    assert torch.equal(written[:, :, 1], v)
    kv[slots // BLOCK_TOKENS, 0, :, :, slots % BLOCK_TOKENS] = 0
    assert not kv.any(), "something else was written"


def test_a_position_one_off_is_noticed() -> None:
    qkv, slots = make_qkv(3, torch.float32), torch.arange(3)
    q, _, _ = reference(qkv, torch.tensor([4, 5, 6]), 1.0)
    kv = torch.zeros(8, 1, KV_HEADS, 2, BLOCK_TOKENS, HEAD_DIM)
    cos, sin = rope_tables(torch.tensor([4, 5, 7]), FREQUENCIES, 1.0, torch.float32)
    queries = rope_kv_write(qkv, cos, sin, kv, rows_of(slots), num_heads=HEADS)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(queries, q, rtol=1e-2, atol=1e-2)


def test_rows_for_another_number_of_tokens_are_refused() -> None:
    kv = torch.zeros(8, 1, KV_HEADS, 2, BLOCK_TOKENS, HEAD_DIM)
    cos, sin = rope_tables(torch.arange(3), FREQUENCIES, 1.0, torch.float32)
    with pytest.raises(ValueError, match="3 tokens need 12 rows, got 8"):
        rope_kv_write(
            make_qkv(3, torch.float32), cos, sin, kv, rows_of(torch.arange(2)), num_heads=HEADS
        )
