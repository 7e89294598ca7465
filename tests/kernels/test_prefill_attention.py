"""Prefill attention of a chunk equals plain causal attention over everything before it."""

import pytest
import torch
from paged_context import LAYER, make_paged, plain_attention

from paceline.kernels.prefill_attention import plan_context, prefill_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("window", [None, 1, 30, 200])
@pytest.mark.parametrize(("start", "count"), [(0, 2), (0, 50), (16, 16), (37, 64), (300, 3)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_tokens", "dtype"),
    [
        (9, 3, 16, torch.float32),
        (4, 4, 32, torch.float32),
        (6, 1, 16, torch.float32),
        (8, 2, 16, torch.bfloat16),
    ],
)
def test_equals_plain_attention(
    heads: int,
    kv_heads: int,
    block_tokens: int,
    dtype: torch.dtype,
    start: int,
    count: int,
    window: int | None,
) -> None:
    paged = make_paged(
        [start + count], kv_heads=kv_heads, head_dim=32, block_tokens=block_tokens, dtype=dtype
    )
    q = torch.randn(count, heads, 32).to(dtype)
    context = plan_context(paged.tables[0], start, count, paged.kv, window)
    output = prefill_attention(q, paged.kv, LAYER, context, 0.2)
    expected = plain_attention(q, paged.keys[0], paged.values[0], window, 0.2)
    torch.testing.assert_close(
        output.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_a_start_one_off_is_noticed() -> None:
    paged = make_paged([60], kv_heads=2, head_dim=16, block_tokens=16, dtype=torch.float32)
    q = torch.randn(20, 4, 16)
    expected = plain_attention(q, paged.keys[0], paged.values[0], None, 0.2)
    context = plan_context(paged.tables[0], 39, 20, paged.kv)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            prefill_attention(q, paged.kv, LAYER, context, 0.2), expected, rtol=1e-2, atol=1e-2
        )


def test_heads_that_cannot_share_are_refused() -> None:
    paged = make_paged([8], kv_heads=2, head_dim=4, block_tokens=16, dtype=torch.float32)
    context = plan_context(paged.tables[0], 0, 8, paged.kv)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        prefill_attention(torch.randn(8, 3, 4), paged.kv, LAYER, context, 1.0)
