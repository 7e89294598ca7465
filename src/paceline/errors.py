"""The one tree of errors.

    PacelineError
    ├── ConfigError               the settings cannot work; raised before anything starts
    │   ├── UnsupportedModelError the model's architecture or a configuration key is not implemented
    │   └── CapacityError         the settings ask for more memory, GPUs or workers than there are
    ├── RequestError              this request cannot be served as it was sent
    │   ├── InvalidRequestError   a field is wrong; `violations` names each one
    │   ├── ModelNotFoundError    the request names a model that is not served
    │   ├── OverloadedError       too much to do for this request; `retry_after_s`: come back then
    │   │   └── QueueFullError    the queue is full
    │   ├── DeadlineExceededError the deadline passed before the last token
    │   └── CancelledError        the client went away
    ├── UnavailableError          no worker can serve now (starting, draining, stopped)
    ├── RequestFailedError        the request met failing workers more often than allowed
    ├── TransferError             a KV transfer did not happen
    │   └── TransportError        a transport failed, is missing or is slower than allowed
    ├── OutOfBlocksError          more KV blocks were asked for than can be freed
    └── IntegrityError            an invariant does not hold: a bug in paceline

A message says what happened with numbers, why, and which setting to change. Each class maps once to
a gRPC status (`grpc_code`, the name in `grpc.StatusCode`) and once to an HTTP status.
"""

from typing import ClassVar, NamedTuple

MAX_MESSAGE_CHARS = 4000
"""Of an error. What a client sent may be part of it, and it goes into logs and answers."""
MAX_VIOLATIONS = 16
"""Named in one error; more are only counted."""


def clip(text: str, max_chars: int) -> str:
    """Cut a text that is too long, and say how long it was."""
    if len(text) <= max_chars:
        return text
    return f"{text[:max_chars]}… ({len(text)} characters)"


class PacelineError(Exception):
    """Base of every error that paceline raises on purpose. A message that is too long is cut."""

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str = "") -> None:
        super().__init__(clip(message, MAX_MESSAGE_CHARS))


class ConfigError(PacelineError):
    """Say that the settings cannot work; raised before anything starts."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 400


class UnsupportedModelError(ConfigError):
    """Say which architecture or configuration key is not implemented, and what is."""


class CapacityError(ConfigError):
    """Say what was asked for, what there is, and the largest value that fits."""

    grpc_code = "RESOURCE_EXHAUSTED"


class RequestError(PacelineError):
    """Base of what a client did or met; the server is well."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class FieldViolation(NamedTuple):
    """One wrong field of a request: its path as in the proto, and what is wrong with it."""

    field: str
    description: str


class InvalidRequestError(RequestError):
    """Name the wrong fields of a request, the first MAX_VIOLATIONS of them."""

    def __init__(self, *violations: FieldViolation) -> None:
        self.violations = violations[:MAX_VIOLATIONS]
        parts = [f"{v.field}: {v.description}" for v in self.violations]
        if len(violations) > MAX_VIOLATIONS:
            parts.append(f"and {len(violations) - MAX_VIOLATIONS} more")
        super().__init__("; ".join(parts))


class ModelNotFoundError(RequestError):
    """The request names a model that this deployment does not serve."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class OverloadedError(RequestError):
    """The router has more to do than it can for this request; it has not been taken."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(OverloadedError):
    """The router's queue is at its bound."""


class DeadlineExceededError(RequestError):
    """The request's deadline passed before its last token."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class CancelledError(RequestError):
    """The client went away or cancelled."""

    grpc_code = "CANCELLED"
    http_status = 499


class UnavailableError(PacelineError):
    """No worker can serve this now; trying again later can help."""

    grpc_code = "UNAVAILABLE"
    http_status = 503


class RequestFailedError(PacelineError):
    """The request met failing workers more often than allowed."""

    grpc_code = "ABORTED"


class TransferError(PacelineError):
    """Base of what can go wrong when KV blocks move."""


class TransportError(TransferError):
    """A transport failed, is missing, or is slower than the settings allow."""

    grpc_code = "UNAVAILABLE"


class OutOfBlocksError(PacelineError):
    """More KV blocks were asked for than are free or can be evicted."""

    grpc_code = "RESOURCE_EXHAUSTED"


class IntegrityError(PacelineError):
    """An invariant does not hold: a bug in paceline. The message has the numbers that disagree."""


def cause_of(error: BaseException) -> str:
    """Say why in the error's own words; a bug also gets its type and place."""
    if isinstance(error, PacelineError):
        return str(error)
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    place = f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})" if frame else ""
    return f"{type(error).__name__}: {error}{place}"
