"""How large messages can be. One that is larger than a worker accepts would end the stream, and
with it all other requests on it, so a request that could grow so large is refused. Pure."""

from paceline.wire import MAX_MESSAGE_BYTES

TOKEN_ID_BYTES = 5
"""Of a token id as a varint, at most."""

OTHER_BYTES = 1 << 20
"""More than all else in a message may take: names, addresses, sampling parameters. The limits of
`SamplingParams` and of request ids bound those."""

MIN_REQUEST_BYTES = 1 << 20
REQUEST_BYTES_PER_TOKEN = 8
"""Room for text, of which a token is 4 to 5 bytes on average, and for token ids."""

MAX_WORK_TOKENS = (MAX_MESSAGE_BYTES - OTHER_BYTES) // TOKEN_ID_BYTES
"""Token ids, of prompt and output so far, that fit into the message of one dispatch."""


def default_request_bytes(max_model_len: int) -> int:
    """Bytes of a client's request at most, unless the settings say otherwise."""
    return max(MIN_REQUEST_BYTES, REQUEST_BYTES_PER_TOKEN * max_model_len)
