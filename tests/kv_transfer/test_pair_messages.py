"""Messages of a `torch_distributed` pair come back as they were sent, or not at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import TransportError
from paceline.kv_transfer.pair_messages import Ask, Drop, Go, No, PairMessage, Put, decode, encode

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)
MESSAGES = st.one_of(
    st.builds(Ask, U64, U64, U64, st.booleans(), st.lists(U32, max_size=9).map(tuple)),
    st.builds(Drop, U64),
    st.builds(Go, U64, U32),
    st.builds(No, U64, st.text()),
    st.builds(Put, U32, st.text(max_size=9), st.binary()),
)


@given(MESSAGES)
def test_a_message_comes_back_as_it_was_sent(message: PairMessage) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=40))
def test_any_bytes_are_a_message_or_a_transport_error(payload: bytes) -> None:
    try:
        decode(payload)
    except TransportError:
        return


@pytest.mark.parametrize("payload", [b"", b"\x09", b"\x01\x00", encode(Drop(7))[:-1]])
def test_damaged_messages_are_refused(payload: bytes) -> None:
    with pytest.raises(TransportError, match="message"):
        decode(payload)
