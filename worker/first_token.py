"""First tokens of a lease as messages."""

from paceline.errors import TransferError
from paceline.internal.v1 import kv_pb2
from paceline.kv_transfer.lease import FirstToken
from paceline.v1 import inference_pb2
from paceline.wire import (
    finish_reason_from_proto,
    finish_reason_to_proto,
    top_logprobs_from_proto,
    top_logprobs_to_proto,
)


def first_token_to_proto(token: FirstToken) -> kv_pb2.FirstToken:
    message = kv_pb2.FirstToken(choice=token.choice, token_id=token.token_id)
    if token.finish_reason is not None:
        message.finish_reason = finish_reason_to_proto(token.finish_reason)
    if token.logprobs is not None:
        message.logprob = token.logprobs.logprob
        message.top_logprobs.extend(top_logprobs_to_proto(token.logprobs))
    return message


def first_token_from_proto(message: kv_pb2.FirstToken, vocab_size: int) -> FirstToken:
    """Read a first token. Raises TransferError for one that would end the engine."""
    if message.token_id >= vocab_size:
        raise TransferError(
            f"the first token of choice {message.choice} is {message.token_id}, the vocabulary has "
            f"{vocab_size}"
        )
    ended = message.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED
    return FirstToken(
        message.choice,
        message.token_id,
        finish_reason_from_proto(message.finish_reason) if ended else None,
        top_logprobs_from_proto(message.logprob, message.top_logprobs)
        if message.HasField("logprob")
        else None,
    )
