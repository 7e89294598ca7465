"""The options of the product's gRPC channels and servers, in one place.

They are plain values: this module needs no gRPC, so every process can share it.
"""

from paceline.wire import MAX_MESSAGE_BYTES

GrpcOptions = tuple[tuple[str, int], ...]

INTERNAL_CHANNEL: GrpcOptions = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A proxy in the environment is for the way to the internet. It knows no worker.
    ("grpc.enable_http_proxy", 0),
    # A later incarnation of a worker may use the address of an earlier one: each has its own
    # connection.
    ("grpc.use_local_subchannel_pool", 1),
    # A stream that breaks is not begun again by itself: its work has gone elsewhere.
    ("grpc.enable_retries", 0),
)
"""Of a channel between processes of a deployment."""


def server_options(max_request_bytes: int) -> GrpcOptions:
    """Give the options of a server; `max_request_bytes` is the largest message that it takes."""
    return (
        # Two servers on one port would share its requests.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_request_bytes),
        # Finds peers whose machine is gone, so that they hold no request, credit or lease.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
    )


INTERNAL_SERVER: GrpcOptions = server_options(MAX_MESSAGE_BYTES)
"""Of a worker's server, which other processes of the deployment call."""
