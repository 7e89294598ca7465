"""The way in and out of the dispatcher for one request, whatever API it came by.

`Generations.start` validates and queues a request; the Generation that it returns is awaited for
output and must be closed, which frees everything that the request still holds.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from paceline.errors import (
    CancelledError,
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    PacelineError,
)
from paceline.request import PhaseTimes, Span
from paceline.router.active_request import ActiveRequest
from paceline.router.chat_template import ChatMessage
from paceline.router.dispatch import Dispatcher
from paceline.router.journal import ChoiceDelta, RequestJournal, Text
from paceline.router.lag import LoopLag, check_lag
from paceline.router.message_size import MAX_WORK_TOKENS
from paceline.router.model import ServedModel
from paceline.router.prompt_encoder import PromptEncoder
from paceline.router.settings import RouterSettings
from paceline.router.special_stops import special_stop_violations, with_special_stops
from paceline.router.text_stream import TextStream
from paceline.router.validate import (
    check_model,
    check_prompt_size,
    envelope_violations,
    prompt_violations,
    sampling_violations,
)
from paceline.sampling_params import MAX_CHOICES, SamplingParams

logger = logging.getLogger(__name__)


class TextPrompt(NamedTuple):
    """Plain text."""

    text: str


class TokenPrompt(NamedTuple):
    """Token ids, used as they are."""

    token_ids: Sequence[int]


class ChatPrompt(NamedTuple):
    """A conversation."""

    messages: Sequence[ChatMessage]


Prompt = TextPrompt | TokenPrompt | ChatPrompt

_PROMPT_FIELDS: dict[type, str] = {
    TextPrompt: "text",
    TokenPrompt: "token_ids",
    ChatPrompt: "chat.messages",
}


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """A request as an API received it."""

    prompt: Prompt | None
    sampling: SamplingParams
    model: str = ""
    request_id: str = ""
    timeout_s: float = 0.0
    """0: the router's default"""
    transport_timeout_s: float | None = None
    """What is left of the deadline of the connection's protocol, if it has one"""


class Usage(NamedTuple):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    resumed: int


class Generation:
    """A request on its way. Belongs to the one task that awaits its output."""

    def __init__(self, request: ActiveRequest, owner: "Generations") -> None:
        self._request = request
        self._owner = owner
        self._news = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        request.listener = self._news.set

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def has_succeeded(self) -> bool:
        """Whether every choice has finished, so that what was taken last is the end."""
        return self._request.is_done and self._request.error is None

    async def next_deltas(self) -> list[ChoiceDelta]:
        """Wait for output and take all there is; empty when the request has ended.

        Raises what ended the request early, after its output has been taken.
        """
        request = self._request
        while True:
            self._news.clear()
            deltas = request.journal.take()
            if deltas:
                return deltas
            if request.error is not None:
                raise request.error
            if request.is_done:
                return []
            await self._news.wait()

    def usage(self) -> Usage:
        journal = self._request.journal
        return Usage(
            len(journal.prompt),
            journal.num_output_tokens,
            self._request.cached_tokens or 0,
            self._request.num_resumed,
        )

    def phase_times(self) -> PhaseTimes:
        return self._request.phase_times()

    def timeline(self) -> list[Span]:
        """Return where the request was when, by Unix time: the router's own spans and the
        workers'."""
        return self._owner.timeline(self._request)

    def start_deadline(self, limit: str) -> None:
        """End the request when it is not done by its deadline; `limit` names what set it."""
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_at(
            self._request.deadline_s, self._owner.expire, self._request, limit
        )

    def fail(self, error: PacelineError) -> None:
        """End the request early, for this reason."""
        self._owner.fail(self._request, error)

    def close(self) -> None:
        """Free all that the request holds, here and at the workers; log its end."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._owner.close(self._request)


class Generations:
    """Make generations, and answer for what they share: model, tokenizer, dispatcher."""

    def __init__(
        self,
        *,
        name_prefix: str,
        router_id: str,
        model: ServedModel,
        settings: RouterSettings,
        encoder: PromptEncoder,
        dispatcher: Dispatcher,
        lag: LoopLag,
        on_change: Callable[[], None],
    ) -> None:
        self._name_prefix = name_prefix
        self._router_id = router_id
        self.model = model
        self._settings = settings
        self._encoder = encoder
        self._special_tokens = {
            text: token_id
            for text, token_id in encoder.detokenizer.special_tokens.items()
            if token_id < model.vocab_size  # the model never outputs the others
        }
        self._dispatcher = dispatcher
        self._lag = lag
        self._on_change = on_change
        self._numbers = itertools.count(1)

    async def start(self, call: GenerationCall) -> Generation:
        """Validate and queue a request; raises a RequestError that says why it is refused."""
        arrived_s = asyncio.get_running_loop().time()
        number = next(self._numbers)
        check_lag(self._lag.lag(arrived_s), self._settings.max_lag_s)
        timeout_s, limit = self._timeout(call)
        self._dispatcher.check_room(arrived_s + timeout_s, arrived_s)  # before tokenizing
        try:
            async with asyncio.timeout_at(arrived_s + timeout_s):
                prompt = await self._validated_prompt(call)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"the prompt was not tokenized in time; the limit was {limit}. Allow more time or "
                "send less text"
            ) from error
        request = self._new_request(call, prompt, number, arrived_s, arrived_s + timeout_s)
        generation = Generation(request, self)
        self._dispatcher.submit(request, self._now())
        generation.start_deadline(limit)
        self._on_change()
        return generation

    async def tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, TokenPrompt):
            check_prompt_size(len(prompt.token_ids), self.model, "token_ids")
            return list(prompt.token_ids)
        if isinstance(prompt, TextPrompt):
            encoded = await self._encoder.encode_text(prompt.text)
        else:
            encoded = await self._encoder.encode_chat(prompt.messages)
        token_ids: list[int] = encoded.tolist()
        return token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._encoder.has_chat_template

    def expire(self, request: ActiveRequest, limit: str) -> None:
        self._dispatcher.expire(request, limit, self._now())

    def fail(self, request: ActiveRequest, error: PacelineError) -> None:
        self._dispatcher.fail(request, error, self._now())

    def close(self, request: ActiveRequest) -> None:
        self._dispatcher.fail(request, CancelledError("the client went away"), self._now())
        _log_end(request)

    def timeline(self, request: ActiveRequest) -> list[Span]:
        to_unix = time.time() - self._now()
        router_id = self._router_id
        dispatched, first, last = (
            request.first_dispatch_s,
            request.first_token_s,
            request.last_token_s,
        )
        spans = list(request.spans)
        reported = {span.phase for span in spans}
        times = request.phase_times()
        if dispatched is not None:
            spans.append(
                Span("queue", router_id, request.arrived_s + to_unix, dispatched + to_unix)
            )
            if times.wait_s > 0:
                start_s = dispatched + to_unix
                spans.append(Span("wait", router_id, start_s, start_s + times.wait_s))
            if first is not None and times.router_s > 0:
                end_s = first + to_unix
                spans.append(Span("router", router_id, end_s - times.router_s, end_s))
            if first is not None and "prefill" not in reported:
                num_tokens = len(request.journal.prompt)
                start_s, end_s = dispatched + to_unix, first - times.router_s + to_unix
                spans.append(Span("prefill", router_id, start_s, end_s, num_tokens))
        if first is not None and last is not None and "decode" not in reported:
            num_tokens = request.journal.num_output_tokens
            spans.append(Span("decode", router_id, first + to_unix, last + to_unix, num_tokens))
        return sorted(spans, key=lambda span: span.start_s)

    def _timeout(self, call: GenerationCall) -> tuple[float, str]:
        """Return the seconds that the request may take, and which limit that is."""
        if call.timeout_s > 0:
            timeout_s, limit = call.timeout_s, f"timeout_s, {call.timeout_s:g} s"
        else:
            timeout_s = self._settings.default_timeout_s
            limit = f"router.default_timeout_s, {timeout_s:g} s"
        transport_s = call.transport_timeout_s
        if transport_s is not None and not transport_s > timeout_s:
            return transport_s, f"the call's deadline, {transport_s:.3f} s"
        return timeout_s, limit

    async def _validated_prompt(self, call: GenerationCall) -> list[int]:
        """Tokenize the prompt; raises with every violation of the request."""
        check_model(call.model, self.model)
        violations = [
            *envelope_violations(call.request_id, call.timeout_s, self._settings),
            *sampling_violations(call.sampling, self.model),
            *special_stop_violations(call.sampling, self._special_tokens),
        ]
        token_ids: list[int] = []
        if call.prompt is None:
            violations.append(
                FieldViolation("prompt", "is missing; send text, token_ids or chat messages")
            )
        else:
            field = _PROMPT_FIELDS[type(call.prompt)]
            try:
                token_ids = await self.tokenize(call.prompt)
                check_prompt_size(len(token_ids), self.model, field)
            except InvalidRequestError as error:
                violations.extend(error.violations)
            else:
                violations += prompt_violations(token_ids, call.sampling, self.model, field)
        if violations:
            raise InvalidRequestError(*violations)
        return token_ids

    def _new_request(
        self,
        call: GenerationCall,
        prompt: Sequence[int],
        number: int,
        arrived_s: float,
        deadline_s: float,
    ) -> ActiveRequest:
        sampling = with_special_stops(call.sampling, self._special_tokens)
        no_limit = sampling.max_tokens is None
        if no_limit:
            longest = min(self.model.max_model_len, MAX_WORK_TOKENS + 1)
            sampling = replace(sampling, max_tokens=longest - len(prompt))
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(64))
        silent = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            silent.update(self.model.eos_token_ids)
        detokenizer = self._encoder.detokenizer
        continues_text = detokenizer.has_text(prompt)
        texts: list[Text] = [
            TextStream(
                detokenizer,
                continues_text=continues_text,
                stop=sampling.stop,
                silent=silent,
                min_tokens=sampling.min_tokens,
            )
            for _ in range(min(sampling.n, MAX_CHOICES))
        ]
        journal = RequestJournal(np.array(prompt, dtype=np.int32), sampling, texts)
        request_id = call.request_id or secrets.token_hex(8)
        return ActiveRequest(
            request_id,
            f"{request_id}@{self._name_prefix}.{number}",
            journal,
            arrived_s,
            max_tokens_is_default=no_limit,
            deadline_s=deadline_s,
        )

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _log_end(request: ActiveRequest) -> None:
    times = request.phase_times()
    error: PacelineError | None = request.error
    journal = request.journal
    total_s = 0.0 if request.ended_s is None else request.ended_s - request.arrived_s
    logger.info(
        "request_end request_id=%s outcome=%s finish=%s prompt_tokens=%d completion_tokens=%d "
        "cached_tokens=%d resumed=%d queue_s=%.4f wait_s=%.4f prefill_s=%.4f router_s=%.4f "
        "kv_transfer_s=%.4f decode_s=%.4f total_s=%.4f%s",
        request.request_id,
        "OK" if error is None else error.grpc_code,
        ",".join("-" if c.finish_reason is None else c.finish_reason.name for c in journal.choices),
        len(journal.prompt),
        journal.num_output_tokens,
        request.cached_tokens or 0,
        request.num_resumed,
        times.queue_s,
        times.wait_s,
        times.prefill_s,
        times.router_s,
        times.kv_transfer_s,
        times.decode_s,
        total_s,
        "" if error is None else f" error={str(error)!r}",
    )
