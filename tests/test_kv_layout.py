"""The layout of a block, and what two pools must share."""

import pytest

from paceline.kv_layout import KvGroup, KvLayout, Plane, attention_layout


def make_layout(
    num_layers: int = 2, num_kv_heads: int = 3, block_tokens: int = 16, dtype: str = "float32"
) -> KvLayout:
    return attention_layout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        block_tokens=block_tokens,
        dtype=dtype,
    )


def test_a_block_is_layers_heads_keys_and_values_tokens_and_dims() -> None:
    layout = make_layout()
    assert layout.groups[0].planes[0].shape == (2, 3, 2, 16, 8)
    assert layout.block_bytes == 2 * 3 * 2 * 16 * 8 * 4


def test_a_block_of_the_8b_shape_is_2_mib() -> None:
    layout = attention_layout(
        num_layers=32, num_kv_heads=8, head_dim=128, block_tokens=16, dtype="bfloat16"
    )
    assert layout.block_bytes == 2 << 20


def test_bytes_add_up_over_groups_and_planes() -> None:
    values = Plane("values", "float16", (4, 8))
    scales = Plane("scales", "float32", (4,))
    layout = KvLayout(16, (KvGroup((0,), (values, scales)), KvGroup((1,), (values,), window=128)))
    assert layout.block_bytes == 2 * 4 * 8 * 2 + 4 * 4


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert make_layout().fingerprint("r1") == make_layout().fingerprint("r1")


@pytest.mark.parametrize(
    "other",
    [
        make_layout(num_layers=3).fingerprint("r1"),
        make_layout(num_kv_heads=2).fingerprint("r1"),
        make_layout(block_tokens=32).fingerprint("r1"),
        make_layout(dtype="bfloat16").fingerprint("r1"),
        make_layout().fingerprint("r2"),
        make_layout().fingerprint("r1", adapter="a"),
    ],
)
def test_any_difference_changes_the_fingerprint(other: bytes) -> None:
    assert other != make_layout().fingerprint("r1")


def test_the_description_names_tokens_dtype_and_shape() -> None:
    assert make_layout().describe() == "16 tokens a block, kv float32[2, 3, 2, 16, 8]"
