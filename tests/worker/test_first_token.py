"""First tokens of a lease cross the wire whole."""

import pytest

from paceline.internal.v1 import kv_pb2
from paceline.kv_transfer.lease import FirstToken
from paceline.request import FinishReason, TopLogprobs
from paceline.worker.first_token import first_token_from_proto, first_token_to_proto


@pytest.mark.parametrize(
    "token",
    [
        FirstToken(0, 7),
        FirstToken(3, 0, FinishReason.STOP),
        FirstToken(1, 9, FinishReason.LENGTH, TopLogprobs(-0.5, (9, 4), (-0.5, -1.25))),
        FirstToken(1, 9, None, TopLogprobs(0.0, (), ())),
    ],
)
def test_a_first_token_comes_out_as_it_went_in(token: FirstToken) -> None:
    encoded = first_token_to_proto(token).SerializeToString()
    assert first_token_from_proto(kv_pb2.FirstToken.FromString(encoded), 100) == token
