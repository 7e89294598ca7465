"""Turn errors into rich gRPC statuses, with the details that google.rpc defines for them."""

from collections.abc import Iterator

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from paceline.errors import InvalidRequestError, OverloadedError, PacelineError, clip

# Statuses travel in HTTP/2 trailers, of which clients accept 8 KiB.
_MAX_MESSAGE_CHARS = 2000
_MAX_DESCRIPTION_CHARS = 200


def to_status(error: PacelineError) -> grpc.Status:
    """Build the status that the client gets for an error."""
    details = []
    for message in _details(error):
        detail = any_pb2.Any()
        detail.Pack(message)
        details.append(detail)
    code: int = grpc.StatusCode[error.grpc_code].value[0]
    status: grpc.Status = rpc_status.to_status(
        status_pb2.Status(code=code, message=clip(str(error), _MAX_MESSAGE_CHARS), details=details)
    )
    return status


def _details(error: PacelineError) -> Iterator[Message]:
    if isinstance(error, InvalidRequestError):
        yield error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=clip(violation.field, _MAX_DESCRIPTION_CHARS),
                    description=clip(violation.description, _MAX_DESCRIPTION_CHARS),
                )
                for violation in error.violations
            ]
        )
    if isinstance(error, OverloadedError):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)
