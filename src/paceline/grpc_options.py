"""The options of the product's gRPC channels and servers, in one place.

They are plain values: this module needs no gRPC, so every process can share it.
"""

from paceline.wire import MAX_MESSAGE_BYTES

GrpcOptions = tuple[tuple[str, int], ...]

_KEEPALIVE: GrpcOptions = (
    # Ends connections to machines that are gone, and those that a peer no longer reads, so that
    # they hold no request, credit or lease.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Of gRPC's other pings: while one is not answered, keepalive sends none, for a minute.
    ("grpc.http2.ping_timeout_ms", 5_000),
)
_NO_COMPRESSION: GrpcOptions = (
    # gRPC unpacks a whole message before it looks at its size: 0.5 MB became 1.2 GB. Of the bits
    # only "not compressed" is set; the answer to others is UNIMPLEMENTED, as the protocol wants.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)

CLIENT_CHANNEL: GrpcOptions = (
    # A proxy in the environment is for the way to the internet. It often cannot reach this machine
    # or its neighbours.
    ("grpc.enable_http_proxy", 0),
)
"""Of a channel of the command line or a benchmark to a server of ours."""

INTERNAL_CHANNEL: GrpcOptions = (
    *_KEEPALIVE,
    *_NO_COMPRESSION,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    *CLIENT_CHANNEL,
    # A later incarnation of a worker may use the address of an earlier one: each has its own
    # connection.
    ("grpc.use_local_subchannel_pool", 1),
    # A stream that breaks is not begun again by itself: its work has gone elsewhere.
    ("grpc.enable_retries", 0),
    # A session may be silent for longer than gRPC lets a client ping by default.
    ("grpc.http2.max_pings_without_data", 0),
)
"""Of a channel between processes of a deployment."""

MAX_CONNECTIONS = 4096
MAX_STREAMS_PER_CONNECTION = 4096
"""Several times router.max_queue_requests, for a gateway whose clients share a connection."""
MAX_CALLS = 16_384
"""That run at once in a server; more are answered RESOURCE_EXHAUSTED."""


def server_options(max_request_bytes: int) -> GrpcOptions:
    """Give the options of a server; `max_request_bytes` is the largest message that it takes."""
    return (
        *_KEEPALIVE,
        *_NO_COMPRESSION,
        # Two servers on one port would share its requests.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
        ("grpc.http2.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        # A connection that is opened and says nothing; one on which there is no call.
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 600_000),
        # Keepalive of the deployment's own channels is no abuse.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # Seconds that a call may wait to be begun. Calls that a client gave up at once fill that
        # queue, and each would cost as much as one that somebody wants.
        ("grpc.server_max_unrequested_time_in_server", 1),
    )
