"""How large a message to a worker can be. One that is larger than the worker accepts would end the
stream, and with it all other requests on it, so a request that could grow so large is refused.
Pure."""

from paceline.wire import MAX_MESSAGE_BYTES

TOKEN_ID_BYTES = 5
"""Of a token id as a varint, at most."""

OTHER_BYTES = 1 << 20
"""More than all else in a message may take: names, addresses, sampling parameters. The limits of
`SamplingParams` and of request ids bound those."""

MAX_WORK_TOKENS = (MAX_MESSAGE_BYTES - OTHER_BYTES) // TOKEN_ID_BYTES
"""Token ids, of prompt and output so far, that fit into the message of one dispatch."""
