"""A pool's size: what was asked for, or an error that names the largest value that works."""

import re

import pytest
import torch

from paceline.engine.kv_pool import (
    RESERVED_BYTES,
    KvPool,
    num_blocks_that_fit,
)
from paceline.errors import CapacityError
from paceline.kv_layout import attention_layout

LAYOUT = attention_layout(
    num_layers=3, num_kv_heads=2, head_dim=8, block_tokens=16, dtype="float32"
)
ENOUGH = 10 << 30


def fit(**sizes: int | None) -> int:
    given = {"num_kv_blocks": None, "kv_cache_bytes": 1 << 20, "available_bytes": ENOUGH}
    return num_blocks_that_fit(LAYOUT, **(given | sizes))  # type: ignore[arg-type]


def test_bytes_are_turned_into_whole_blocks_and_a_number_of_blocks_is_taken_as_it_is() -> None:
    assert fit(kv_cache_bytes=10 * LAYOUT.block_bytes + 1) == 10
    assert fit(num_kv_blocks=7) == 7


@pytest.mark.parametrize("name", ["num_kv_blocks", "kv_cache_bytes"])
def test_the_value_that_the_error_names_works(name: str) -> None:
    available = RESERVED_BYTES + 100 * LAYOUT.block_bytes
    with pytest.raises(CapacityError) as refusal:
        fit(**{name: 1 << 40}, available_bytes=available)
    found = re.search(rf"Lower {name} to at most (\d+)", str(refusal.value))
    assert found
    assert fit(**{name: int(found[1])}, available_bytes=available) == 100
    with pytest.raises(CapacityError):
        fit(num_kv_blocks=101, available_bytes=available)


def test_fewer_than_two_blocks_are_refused_with_the_bytes_needed() -> None:
    with pytest.raises(CapacityError, match=f"at least {2 * LAYOUT.block_bytes}"):
        fit(kv_cache_bytes=LAYOUT.block_bytes)


def test_the_view_and_the_bytes_are_one_memory() -> None:
    pool = KvPool(LAYOUT, torch.zeros(4, LAYOUT.block_bytes, dtype=torch.uint8))
    assert pool.kv.shape == (4, 3, 2, 2, 16, 8)
    pool.kv[2] = 1.0
    assert pool.blocks[2].any()
    assert not pool.blocks[[0, 1, 3]].any()


def test_memory_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks must be uint8"):
        KvPool(LAYOUT, torch.zeros(4, LAYOUT.block_bytes + 1, dtype=torch.uint8))
