"""The public gRPC API: translate between `paceline.v1` messages and generations."""

import asyncio
import contextlib
import logging
from typing import TypeAlias

import grpc

from paceline.errors import (
    CancelledError,
    FieldViolation,
    InvalidRequestError,
    PacelineError,
    clip,
)
from paceline.router.chat_template import ChatMessage
from paceline.router.generation import (
    ChatPrompt,
    Generation,
    GenerationCall,
    Generations,
    Prompt,
    TextPrompt,
    TokenPrompt,
)
from paceline.router.grpc_status import to_status
from paceline.router.journal import ChoiceDelta, Logprobs
from paceline.router.unread_output import UnreadOutput
from paceline.router.validate import MAX_REQUEST_ID_CHARS, check_chat_size, check_model
from paceline.v1 import inference_pb2, inference_pb2_grpc
from paceline.wire import (
    finish_reason_to_proto,
    phase_times_to_proto,
    sampling_from_request,
    span_to_proto,
)

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 5.0

_GenerateContext: TypeAlias = (
    "grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]"
)
_TokenizeContext: TypeAlias = (
    "grpc.aio.ServicerContext[inference_pb2.TokenizeRequest, inference_pb2.TokenizeResponse]"
)
_AnyContext: TypeAlias = "_GenerateContext | _TokenizeContext"


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Serve `paceline.v1.InferenceService`."""

    def __init__(self, generations: Generations, client_read_timeout_s: float) -> None:
        self._generations = generations
        self._client_read_timeout_s = client_read_timeout_s

    # The stub wants an iterator; gRPC also takes a coroutine that writes to the context, and
    # cancels it, so that its `finally` runs at once, when the client goes away.
    async def Generate(  # type: ignore[override]
        self, request: inference_pb2.GenerateRequest, context: _GenerateContext
    ) -> None:
        try:
            await self._generate(request, context)
        except Exception as error:
            await _abort(context, error, request.request_id)

    async def Tokenize(
        self,
        request: inference_pb2.TokenizeRequest,
        context: _TokenizeContext,
    ) -> inference_pb2.TokenizeResponse:
        response = inference_pb2.TokenizeResponse()
        try:
            check_model(request.model, self._generations.model)
            prompt = _prompt(request)
            if prompt is None:
                raise InvalidRequestError(
                    FieldViolation("prompt", "is missing; send text or chat messages")
                )
            response.token_ids.extend(await self._generations.tokenize(prompt))
        except Exception as error:
            await _abort(context, error)
        return response

    async def GetModelInfo(
        self,
        request: inference_pb2.GetModelInfoRequest,
        context: object,
    ) -> inference_pb2.GetModelInfoResponse:
        model = self._generations.model
        return inference_pb2.GetModelInfoResponse(
            model=model.name,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=self._generations.has_chat_template,
        )

    async def _generate(
        self, request: inference_pb2.GenerateRequest, context: _GenerateContext
    ) -> None:
        generation = await self._generations.start(_call(request, context.time_remaining()))
        try:
            async with UnreadOutput(self._client_read_timeout_s) as output:
                is_last = False
                while not is_last:
                    deltas = await generation.next_deltas()
                    is_last = generation.has_succeeded
                    responses = [_response(generation.request_id, delta) for delta in deltas]
                    if is_last:
                        _add_summary(responses[-1], generation, request.include_timeline)
                    for response in responses:
                        output.begin_write()
                        await context.write(response)
                        output.end_write()
        except TimeoutError as error:
            message = (
                f"the client has not read its output for {self._client_read_timeout_s:g} s "
                "(router.client_read_timeout_s)"
            )
            generation.fail(CancelledError(message))
            raise CancelledError(message) from error
        finally:
            generation.close()


def _call(
    request: inference_pb2.GenerateRequest, transport_timeout_s: float | None
) -> GenerationCall:
    return GenerationCall(
        _prompt(request),
        sampling_from_request(request.sampling),
        request.model,
        request.request_id,
        request.timeout_s,
        transport_timeout_s,
    )


def _prompt(
    request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest,
) -> Prompt | None:
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return TextPrompt(request.text)
    if kind == "chat":
        check_chat_size(len(request.chat.messages))
        messages = [ChatMessage(m.role, m.content) for m in request.chat.messages]
        return ChatPrompt(messages)
    if isinstance(request, inference_pb2.GenerateRequest) and kind == "token_ids":
        return TokenPrompt(request.token_ids.ids)
    return None


def _response(request_id: str, delta: ChoiceDelta) -> inference_pb2.GenerateResponse:
    first = delta.first_index
    if delta.logprobs:
        tokens = [
            _token(index, token_id, logprobs)
            for index, (token_id, logprobs) in enumerate(
                zip(delta.token_ids, delta.logprobs, strict=True), first
            )
        ]
    else:
        tokens = [
            inference_pb2.Token(index=index, token_id=token_id)
            for index, token_id in enumerate(delta.token_ids, first)
        ]
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        choice=delta.choice,
        tokens=tokens,
        text=delta.text,
        finish_reason=(
            inference_pb2.FINISH_REASON_UNSPECIFIED
            if delta.finish_reason is None
            else finish_reason_to_proto(delta.finish_reason)
        ),
    )


def _token(index: int, token_id: int, logprobs: Logprobs | None) -> inference_pb2.Token:
    if logprobs is None:
        return inference_pb2.Token(index=index, token_id=token_id)
    top = [inference_pb2.TokenLogprob(token_id=id_, logprob=lp) for id_, lp in logprobs.top]
    return inference_pb2.Token(
        index=index, token_id=token_id, logprob=logprobs.logprob, top_logprobs=top
    )


def _add_summary(
    response: inference_pb2.GenerateResponse, generation: Generation, include_timeline: bool
) -> None:
    response.usage.CopyFrom(inference_pb2.Usage(**generation.usage()._asdict()))
    response.phase_times.CopyFrom(phase_times_to_proto(generation.phase_times()))
    if include_timeline:
        response.timeline.extend(span_to_proto(span) for span in generation.timeline())


async def _abort(context: _AnyContext, error: Exception, request_id: str = "") -> None:
    """End the call with the error's status; raises, unless the client is gone."""
    if context.done():
        return
    # Of a request that was refused, nothing has been checked: not even its name.
    shown_id = clip(request_id, MAX_REQUEST_ID_CHARS)
    if not isinstance(error, PacelineError):
        logger.error("request_failed request_id=%r", shown_id, exc_info=error)
        error = PacelineError(f"the router met a bug: {type(error).__name__}: {error}")
    elif error.grpc_code not in ("DEADLINE_EXCEEDED", "CANCELLED"):
        logger.info("request_refused request_id=%r error=%r", shown_id, str(error))
    # A client that reads nothing cannot be told; gRPC keeps the call until its connection ends.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await context.abort_with_status(to_status(error))
