"""Decode attention equals plain attention of each row by itself."""

import numpy as np
import pytest
import torch
from paged_context import LAYER, make_paged, plain_attention

from paceline.kernels.decode_attention import decode_attention, plan_spans

LENGTHS = {
    "one short row": [1],
    "one long row": [700],
    "equal rows": [130, 130, 130],
    "block edges": [15, 16, 17, 32, 33],
    "very different rows": [1, 900, 3, 64, 65, 410],
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("window", [None, 1, 40, 64])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "dtype"),
    [
        (9, 3, 64, 16, torch.float32),
        (4, 4, 16, 32, torch.float32),
        (8, 1, 24, 16, torch.float32),
        (6, 2, 32, 16, torch.bfloat16),
    ],
)
def test_equals_plain_attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    name: str,
    window: int | None,
) -> None:
    lengths = LENGTHS[name]
    paged = make_paged(
        lengths, kv_heads=kv_heads, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype
    )
    q = torch.randn(len(lengths), heads, head_dim).to(dtype)
    spans = plan_spans(paged.tables, np.array(lengths, np.int32), paged.kv, window)
    output = decode_attention(q, paged.kv, LAYER, spans, 0.2)
    expected = torch.cat(
        [
            plain_attention(q[row : row + 1], k, v, window, 0.2)
            for row, (k, v) in enumerate(zip(paged.keys, paged.values, strict=True))
        ]
    )
    assert output.dtype is dtype
    torch.testing.assert_close(
        output.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_one_token_more_or_less_is_noticed() -> None:
    paged = make_paged([70, 300], kv_heads=2, head_dim=16, block_tokens=16, dtype=torch.float32)
    q = torch.randn(2, 4, 16)
    right = plan_spans(paged.tables, np.array([70, 300], np.int32), paged.kv)
    wrong = plan_spans(paged.tables, np.array([69, 300], np.int32), paged.kv)
    expected = decode_attention(q, paged.kv, LAYER, right, 0.2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            decode_attention(q, paged.kv, LAYER, wrong, 0.2), expected, rtol=1e-2, atol=1e-2
        )


def test_rows_of_unequal_length_are_not_padded_to_the_longest() -> None:
    lengths = [16] * 31 + [4096]
    paged = make_paged(lengths, kv_heads=1, head_dim=2, block_tokens=16, dtype=torch.float32)
    spans = plan_spans(paged.tables, np.array(lengths, np.int32), paged.kv)
    assert spans.mask.numel() < 1.6 * sum(lengths)


def test_window_reads_only_the_blocks_it_covers() -> None:
    paged = make_paged([2000], kv_heads=1, head_dim=2, block_tokens=16, dtype=torch.float32)
    spans = plan_spans(paged.tables, np.array([2000], np.int32), paged.kv, window=100)
    assert spans.mask.numel() <= 100 + 2 * 16


def test_heads_that_cannot_share_are_refused() -> None:
    paged = make_paged([8], kv_heads=2, head_dim=4, block_tokens=16, dtype=torch.float32)
    spans = plan_spans(paged.tables, np.array([8], np.int32), paged.kv)
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        decode_attention(torch.randn(1, 3, 4), paged.kv, LAYER, spans, 1.0)
