"""Keys name a block by everything that its KV depends on."""

import numpy as np
import pytest

from paceline.block_keys import BlockKeys, make_root_key, token_bytes

ROOT = make_root_key(b"layout and model")


def ids(*values: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.array(values, dtype=np.int32)


def test_key_of_a_block_depends_on_all_tokens_before_it() -> None:
    keys = BlockKeys(ROOT)
    first = keys.full_blocks(ids(1, 2, 3, 4, 5, 6), "", 2)
    second = keys.full_blocks(ids(9, 2, 3, 4, 5, 6), "", 2)
    assert len(set(first) | set(second)) == 6


def test_key_does_not_depend_on_tokens_after_it_and_partial_blocks_have_none() -> None:
    keys = BlockKeys(ROOT)
    assert keys.full_blocks(ids(1, 2, 3, 4, 5), "", 2) == keys.full_blocks(ids(1, 2, 3, 4), "", 2)
    assert keys.full_blocks(ids(1), "", 2) == []


def test_full_blocks_are_the_chain_of_next_keys() -> None:
    keys = BlockKeys(ROOT)
    first = keys.next_key(keys.tenant_key("t"), token_bytes(ids(1, 2)))
    second = keys.next_key(first, token_bytes(ids(3, 4)))
    assert keys.full_blocks(ids(1, 2, 3, 4), "t", 2) == [first, second]


def test_tenants_secrets_and_layouts_have_spaces_of_their_own() -> None:
    spaces = [
        BlockKeys(make_root_key(layout, secret)).full_blocks(ids(1, 2), tenant, 2)[0]
        for layout in (b"layout 1", b"layout 2")
        for secret in (b"", b"secret")
        for tenant in ("", "a", "b")
    ]
    assert len(set(spaces)) == len(spaces)


def test_keys_are_the_same_in_every_process() -> None:
    # A router computes them too: a change of this value is a change of protocol.
    assert BlockKeys(bytes(32)).full_blocks(ids(1, 2), "", 2)[0].hex() == (
        "180764e2dc4572370b43121ae6f8caa9"
    )


def test_token_ids_of_another_dtype_or_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        token_bytes(np.array([1, 2]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"int32\[1, 2\]"):
        token_bytes(np.array([[1, 2]], dtype=np.int32))


@pytest.mark.parametrize("num_bytes", [0, 15, 65])
def test_root_key_of_a_wrong_length_is_refused(num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{num_bytes} bytes"):
        BlockKeys(bytes(num_bytes))


def test_secret_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="65 bytes"):
        make_root_key(b"", bytes(65))
