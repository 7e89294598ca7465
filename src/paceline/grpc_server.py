"""The gRPC server of every process: its bounds, and the answer to messages that cannot be read.

Not one of the shared types: it imports gRPC, as the generated stubs do.
"""

import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from paceline.grpc_options import MAX_CALLS, server_options

logger = logging.getLogger(__name__)


def make_server(max_request_bytes: int) -> grpc.aio.Server:
    """Make a server whose clients can hurt neither it nor each other by what they send."""
    return grpc.aio.server(
        interceptors=(RefuseMalformed(),),
        options=server_options(max_request_bytes),
        maximum_concurrent_rpcs=MAX_CALLS,
    )


class _Malformed:
    """Stands for a message that could not be read."""


_MALFORMED = _Malformed()


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Answer INVALID_ARGUMENT to a message that is not of the method's type, and log one line.

    gRPC itself would answer UNKNOWN and log a traceback. A stream ends with such a message.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        shape = {
            (False, False): "unary_unary",
            (False, True): "unary_stream",
            (True, False): "stream_unary",
            (True, True): "stream_stream",
        }[handler.request_streaming, handler.response_streaming]
        return handler._replace(
            request_deserializer=_reading(handler.request_deserializer),
            **{shape: _checking(getattr(handler, shape), method, handler.request_streaming)},
        )


def _reading(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(message: bytes) -> Any:
        try:
            return deserialize(message)
        except Exception:  # whatever the reader of messages raises
            return _MALFORMED

    return read


def _checking(behaviour: Callable[..., Any], method: str, is_stream: bool) -> Callable[..., Any]:
    """Wrap a method; what it is, a coroutine or a generator, says how gRPC calls it."""
    if not inspect.isasyncgenfunction(behaviour):

        async def call(request: Any, context: Any) -> Any:
            incoming = _Incoming(request) if is_stream else request
            if incoming is _MALFORMED:
                return await _refuse(context, method)
            answer = await behaviour(incoming, context)
            if is_stream and incoming.is_malformed:
                await _refuse(context, method)
            return answer

        return call

    async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
        incoming = _Incoming(request) if is_stream else request
        if incoming is _MALFORMED:
            await _refuse(context, method)
            return
        async with contextlib.aclosing(behaviour(incoming, context)) as answers:
            async for answer in answers:
                yield answer
        if is_stream and incoming.is_malformed:
            await _refuse(context, method)

    return generate


class _Incoming:
    """A stream's messages, up to the first that cannot be read."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages = messages
        self.is_malformed = False

    def __aiter__(self) -> "_Incoming":
        return self

    async def __anext__(self) -> Any:
        message = await anext(self._messages)
        if message is _MALFORMED:
            self.is_malformed = True
            raise StopAsyncIteration
        return message


async def _refuse(context: Any, method: str) -> None:
    logger.info("message_malformed method=%s peer=%s", method, context.peer())
    await context.abort(
        grpc.StatusCode.INVALID_ARGUMENT,
        f"a message to {method} could not be read: it is damaged, or of another version",
    )
