"""Decide what happens to every request. Pure: events and the time come in, commands go out.

A request is a set of choices. Each choice is, until it finishes, either waiting (part of one
WaitingWork) or running (part of one Attempt); `attempt.TRANSITIONS` is the life of an attempt.
Events of workers name attempts by stream ids or keys; those of ended attempts are unknown here,
and so are dropped.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from paceline.errors import (
    DeadlineExceededError,
    PacelineError,
    RequestFailedError,
)
from paceline.request import AttemptKey, FailureReason, FinishReason, Span, Work
from paceline.router.active_request import ActiveRequest, WaitingWork
from paceline.router.attempt import Attempt, AttemptEvent, AttemptState
from paceline.router.deadlines import Ahead, Deadlines
from paceline.router.journal import ChoiceJournal, Logprobs
from paceline.router.placement import Pair, Placement, WorkerLoad, WorkerMember, WorkerView
from paceline.router.queue import WaitingQueue
from paceline.router.request_size import (
    fix_max_tokens,
    need_of,
    too_large,
    too_large_to_go_on,
)
from paceline.router.route_health import RouteHealth
from paceline.router.setbacks import Incarnation, Setbacks
from paceline.router.settings import RouterSettings
from paceline.router.suspects import Suspects

logger = logging.getLogger(__name__)

_STREAM_IDS = 2**32


class TokenColumns(NamedTuple):
    """New tokens of one step: element i of the first three belongs to token i."""

    stream_ids: Sequence[int]
    indices: Sequence[int]
    token_ids: Sequence[int]
    finished: Sequence[tuple[int, FinishReason]] = ()
    """(stream id, why) of choices that ended with their last token here."""
    logprobs: dict[int, Logprobs] | None = None
    """By position in the columns."""


class WorkerCommands(Protocol):
    """What the dispatcher tells workers; nothing here may call back into it."""

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        """Have a prefill worker compute work and lease its KV to `reader`."""

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        """Have a decode worker run work, from KV leased by `source` or from its own prefill."""

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        """Have a worker give up choices of an attempt; all of them if `choices` is empty."""


class _Stream(NamedTuple):
    request: ActiveRequest
    attempt: Attempt
    choice: ChoiceJournal


class Dispatcher:
    """The state of all requests of one router."""

    def __init__(self, settings: RouterSettings, commands: WorkerCommands) -> None:
        self._settings = settings
        self._commands = commands
        self.placement = Placement(RouteHealth(settings.first_rest_s, settings.max_rest_s))
        self.queue: WaitingQueue[WaitingWork] = WaitingQueue(settings.max_queue_requests)
        self._deadlines = Deadlines()
        self._suspects = Suspects()
        self.requests: dict[str, ActiveRequest] = {}
        """Not yet ended, by wire_id."""
        self._streams: dict[int, _Stream] = {}
        self._attempts: dict[AttemptKey, tuple[ActiveRequest, Attempt]] = {}
        self._last_stream_id = 0

    @property
    def num_waiting(self) -> int:
        """Pieces of work that wait for workers."""
        return len(self.queue) + len(self._suspects)

    # Clients.

    def submit(self, request: ActiveRequest, now: float) -> None:
        """Take a new request; raises InvalidRequestError if it fits no pool, and OverloadedError if
        the queue is full or too long for its deadline."""
        error = too_large(request, self.placement.pools)
        if error is not None:
            raise error
        tenant = request.journal.tenant
        self.queue.check_room()
        ahead = Ahead(self.queue.num_ahead(tenant), len(self.queue))
        self._deadlines.take(request, ahead, now)
        choices = tuple(range(len(request.journal.choices)))
        work = WaitingWork(request, choices)
        self.queue.push_new(work, tenant)
        request.waiting.append(work)
        self.requests[request.wire_id] = request
        self.dispatch(now)

    def fail(self, request: ActiveRequest, error: PacelineError, now: float) -> None:
        """End a request early and free all that it held; does nothing if it has ended."""
        self._fail(request, error, now)
        self.dispatch(now)

    def expire(self, request: ActiveRequest, limit: str, now: float) -> None:
        """End a request whose deadline has passed; `limit` names it."""
        times = request.phase_times()
        where = (
            f"{request.journal.num_output_tokens} tokens were generated"
            if request.first_dispatch_s is not None
            else "it was still waiting for a worker"
        )
        setback = f"; {request.last_setback}" if request.last_setback else ""
        message = (
            f"{now - request.arrived_s:.3f} s have passed and {where} (queue {times.queue_s:.3f} "
            f"s){setback}; the limit was {limit}. Allow more time, lower max_tokens, or add workers"
        )
        self.fail(request, DeadlineExceededError(message), now)

    # Workers.

    def worker_joined(self, worker: WorkerView, now: float) -> None:
        self.placement.add(worker)
        self._deadlines.workers_changed()
        self.dispatch(now)

    def worker_lost(self, worker_id: str, now: float, *, is_planned: bool = False) -> None:
        """Put back all work that needed this worker; a death counts, a planned stop does not."""
        worker = self.placement.remove(worker_id)
        if worker is None:
            return
        self._deadlines.workers_changed()
        is_planned = is_planned or worker.load.draining
        incarnation = Incarnation(worker_id, worker.member.incarnation)
        needing = [
            (request, attempt)
            for request, attempt in self._attempts.values()
            if worker_id in attempt.workers()
        ]
        for request, attempt in needing:
            if attempt.state is AttemptState.ENDED:  # its request failed on an earlier round
                continue
            setbacks = attempt.setbacks
            if not is_planned:
                is_alone = attempt.key == self._suspects.running
                setbacks = setbacks.after_death(incarnation, is_alone=is_alone)
            choices = tuple(attempt.streams)
            self._drop(request, attempt, choices, skip=worker_id)
            self._put_back(request, choices, setbacks, now, not_before_s=now)
        self.dispatch(now)

    def load_changed(self, worker_id: str, load: WorkerLoad, now: float) -> None:
        worker = self.placement.workers.get(worker_id)
        if worker is not None:
            worker.update(load)
            if self.num_waiting:
                self.dispatch(now)

    def admission(
        self,
        worker_id: str,
        key: AttemptKey,
        message: str | None,
        cached_tokens: int,
        now: float,
    ) -> None:
        """Take a worker's answer to a dispatch; `message` is None if it was admitted, else why
        not."""
        found = self._attempts.get(key)
        if found is None:
            return
        request, attempt = found
        if message is not None:
            self._give_back(
                request,
                attempt,
                tuple(attempt.streams),
                worker_id,
                FailureReason.REFUSED,
                message,
                now,
            )
            self.dispatch(now)
            return
        self.placement.routes.admitted(worker_id)
        if worker_id == attempt.decode_id:
            attempt.move(AttemptEvent.ADMISSION)
        computes_prompt = worker_id == (attempt.prefill_id or attempt.decode_id)
        if computes_prompt and request.cached_tokens is None:
            request.cached_tokens = min(cached_tokens, len(request.journal.prompt))

    def tokens(self, worker_id: str, columns: TokenColumns, now: float) -> None:
        """Take the new tokens of a step; tokens of ended attempts are dropped."""
        streams = self._streams
        logprobs = columns.logprobs
        touched: dict[ActiveRequest, None] = {}
        ended: list[_Stream] = []
        position = -1
        for stream_id, index, token_id in zip(
            columns.stream_ids, columns.indices, columns.token_ids, strict=True
        ):
            position += 1
            stream = streams.get(stream_id)
            if stream is None:
                continue
            request, attempt, choice = stream
            if not attempt.has_own_token and worker_id == attempt.decode_id:
                self._decode_token(attempt, index)
            extra = None if logprobs is None else logprobs.get(position)
            if choice.add(index, token_id, extra):
                ended.append(stream)
            touched[request] = None
        for stream_id, reason in columns.finished:
            stream = streams.get(stream_id)
            if stream is not None:
                stream.choice.end(reason)
                # A prefill worker that reports an end holds the KV still, for its reader.
                knows = worker_id == stream.attempt.decode_id
                self._drop_finished(stream, skip=worker_id if knows else None)
                touched[stream.request] = None
        for stream in ended:
            self._drop_finished(stream, skip=None)
        for request in touched:
            if request.first_token_s is None:
                request.first_token_s = now
                self._deadlines.first_token(request, now)
            request.last_token_s = now
            if not request.attempts and not request.waiting and request.journal.is_finished:
                self._end(request, now)
            else:
                request.listener()

    def failure(
        self,
        worker_id: str,
        stream_ids: Sequence[int],
        reason: FailureReason,
        message: str,
        now: float,
    ) -> None:
        """Take back choices that a worker cannot go on with."""
        by_attempt: dict[AttemptKey, list[_Stream]] = {}
        for stream_id in stream_ids:
            stream = self._streams.get(stream_id)
            if stream is not None and worker_id in stream.attempt.workers():
                by_attempt.setdefault(stream.attempt.key, []).append(stream)
        for streams in by_attempt.values():
            request, attempt, _ = streams[0]
            if attempt.state is AttemptState.ENDED:  # its request failed on an earlier round
                continue
            choices = tuple(stream.choice.choice for stream in streams)
            self._give_back(request, attempt, choices, worker_id, reason, message, now)
        self.dispatch(now)

    def phase(self, key: AttemptKey, spans: Sequence[Span]) -> None:
        """Note where an attempt's time went on a worker."""
        found = self._attempts.get(key)
        if found is not None:
            found[0].add_spans(key.attempt, spans)

    # Time.

    def dispatch(self, now: float) -> None:
        """Send waiting work as far as the workers have room, in the order of the queue."""
        pools = self.placement.pools
        self.placement.routes.wake(now)
        self._dispatch_suspect(now)
        while (work := self.queue.head(now)) is not None:
            request = work.request
            need = need_of(work, pools)
            pair = self.placement.find(need)
            if pair is None:
                error = too_large_to_go_on(work, pools)
                if error is None:
                    self._deadlines.queue_waits(now)
                    return
                self._fail(request, error, now)
                continue
            pending_tokens = pair.num_pending_tokens
            late = self._deadlines.why_too_late(work, pending_tokens, need.num_tokens, now)
            if late is not None:
                self._fail(request, late, now)
                continue
            self._deadlines.sent(work, pending_tokens, need.num_tokens, now)
            self.queue.pop(now)
            request.waiting.remove(work)
            fix_max_tokens(request, pools)
            self.placement.dispatch(pair, need)
            self._send(work, pair, now)
        self._deadlines.queue_is_empty()

    def next_timer_s(self, now: float) -> float | None:
        """Return when `dispatch` should be called though nothing happens; None: never."""
        times = self.queue.next_ready_s(now), self._suspects.next_ready_s(now)
        return min((at_s for at_s in times if at_s is not None), default=None)

    # How it is done.

    def _dispatch_suspect(self, now: float) -> None:
        """Send the next suspect when the one before has given a token, to workers that run nothing
        else without a token."""
        while self._suspects.running is None:
            work = self._suspects.head(now)
            if work is None:
                self.placement.release()
                return
            need = need_of(work, self.placement.pools)
            pair = self.placement.reserve(need)
            if pair is not None:
                self._suspects.remove(work)
                work.request.waiting.remove(work)
                self.placement.dispatch(pair, need)
                self._suspects.running = self._send(work, pair, now)
                return
            error = too_large_to_go_on(work, self.placement.pools)
            if error is None:
                return
            self._fail(work.request, error, now)

    def _fail(self, request: ActiveRequest, error: PacelineError, now: float) -> None:
        if request.is_done:
            return
        request.error = error
        for attempt in list(request.attempts.values()):
            self._drop(request, attempt, tuple(attempt.streams), skip=None)
        for work in request.waiting:
            self._suspects.remove(work)
            self.queue.remove(work, request.journal.tenant)
        request.waiting.clear()
        self._end(request, now)

    def _send(self, work: WaitingWork, pair: Pair, now: float) -> AttemptKey:
        request = work.request
        request.dispatched(now)
        request.num_resumed += work.is_resumption
        journal = request.journal
        alone = len(work.choices) == 1
        # Choices that go on apart have a name of their own at the workers, where a newer attempt
        # of a request ends the older ones: attempts of their siblings are not older, they are
        # others.
        name = request.wire_id
        if len(work.choices) < len(journal.choices):
            name += "/" + "+".join(map(str, work.choices))
        key = AttemptKey(name, request.num_attempts)
        streams = {choice: self._new_stream_id() for choice in work.choices}
        prefill_id = None if pair.prefill is None else pair.prefill.worker_id
        num_output = len(journal.choices[work.choices[0]].output)
        attempt = Attempt(
            key,
            prefill_id,
            pair.decode.worker_id,
            streams,
            sent_s=now,
            first_own_index=num_output + (prefill_id is not None),
            setbacks=work.setbacks,
        )
        request.attempts[key] = attempt
        self._attempts[key] = (request, attempt)
        for worker in pair.views:
            worker.without_token.add(key)
        for choice, stream_id in streams.items():
            self._streams[stream_id] = _Stream(request, attempt, journal.choices[choice])
        sent = Work(
            key,
            work.choices,
            tuple(streams.values()),
            journal.prompt,
            journal.output_ids(work.choices[0]) if alone else journal.prompt[:0],
            journal.sampling,
            journal.tenant,
        )
        source = None if pair.prefill is None else pair.prefill.member
        self._commands.admit(pair.decode.worker_id, sent, source)
        if pair.prefill is not None:
            self._commands.prefill(pair.prefill.worker_id, sent, pair.decode.member)
        return key

    def _give_back(
        self,
        request: ActiveRequest,
        attempt: Attempt,
        choices: tuple[int, ...],
        worker_id: str,
        reason: FailureReason,
        message: str,
        now: float,
    ) -> None:
        level = logging.WARNING if reason is FailureReason.INTERNAL else logging.DEBUG
        logger.log(
            level,
            "work_given_back request_id=%s attempt=%d worker_id=%s reason=%s message=%r",
            request.request_id,
            attempt.key.attempt,
            worker_id,
            reason.name,
            message,
        )
        self._blame(attempt, worker_id, reason, message, now)
        setbacks = attempt.setbacks.after(worker_id, reason, message)
        self._drop(request, attempt, choices, skip=worker_id)
        ready_s = now + self._backoff_s(setbacks)
        self._put_back(request, choices, setbacks, now, not_before_s=ready_s, reason=reason)

    def _blame(
        self, attempt: Attempt, worker_id: str, reason: FailureReason, message: str, now: float
    ) -> None:
        """Remember who gave work back, so that the next goes elsewhere."""
        if reason in (FailureReason.REFUSED, FailureReason.INTERNAL):
            route: tuple[str, ...] = (worker_id,)
        elif reason in (FailureReason.LEASE_LOST, FailureReason.PROMISE_EXPIRED):
            route = attempt.route
        else:
            return
        is_refusal = reason is FailureReason.REFUSED
        rest_s = self.placement.routes.failed(route, attempt.sent_s, now, is_refusal=is_refusal)
        if rest_s > self._settings.first_rest_s:  # not the first failure in a row
            logger.warning(
                "route_rests workers=%s rest_s=%.1f reason=%s message=%r",
                ",".join(route),
                rest_s,
                reason.name,
                message,
            )

    def _decode_token(self, attempt: Attempt, index: int) -> None:
        """Note a token of the decode worker, until one is its own."""
        routes = self.placement.routes
        if attempt.state is not AttemptState.DECODING:
            attempt.move(AttemptEvent.DECODE_TOKEN)
            routes.worked(attempt.route)
        if index >= attempt.first_own_index:
            attempt.has_own_token = True
            attempt.setbacks = Setbacks()
            self._no_longer_without_token(attempt)
            for worker_id in attempt.route:
                routes.worked((worker_id,))

    def _no_longer_without_token(self, attempt: Attempt) -> None:
        """Note that an attempt has given a token, or has ended."""
        for worker_id in attempt.route:
            worker = self.placement.workers.get(worker_id)
            if worker is not None:
                worker.without_token.discard(attempt.key)
        if self._suspects.running == attempt.key:
            self._suspects.running = None
            self.placement.release()

    def _put_back(
        self,
        request: ActiveRequest,
        choices: tuple[int, ...],
        setbacks: Setbacks,
        now: float,
        *,
        not_before_s: float,
        reason: FailureReason | None = None,
    ) -> None:
        """Queue choices at the head: those without output together, each other one alone. Ends
        the request if they have met too much."""
        why = setbacks.why_too_many(self._settings)
        if why is not None:
            self._fail(request, RequestFailedError(why), now)
            return
        journal = request.journal
        together = tuple(choice for choice in choices if not journal.choices[choice].output)
        alone = [(choice,) for choice in choices if journal.choices[choice].output]
        for group in [together, *alone] if together else alone:
            work = WaitingWork(
                request,
                group,
                setbacks,
                preempted=reason is FailureReason.PREEMPTED,
                is_resumption=reason is not FailureReason.REFUSED,
            )
            request.waiting.append(work)
            if setbacks.is_suspect(self._settings):
                self._suspects.push(work, not_before_s)
            else:
                self.queue.push_resumed(work, request.arrived_s, not_before_s)

    def _drop(
        self,
        request: ActiveRequest,
        attempt: Attempt,
        choices: tuple[int, ...],
        *,
        skip: str | None,
    ) -> None:
        """Forget choices of an attempt, and cancel them at its workers but `skip`, which knows."""
        workers = attempt.workers()
        for choice in choices:
            del self._streams[attempt.streams.pop(choice)]
            request.journal.choices[choice].forget_early()
        is_over = not attempt.streams
        if is_over:
            attempt.move(AttemptEvent.LAST_CHOICE_GONE)
            self.placement.routes.ended(attempt.prefill_id, attempt.decode_id)
            self._no_longer_without_token(attempt)
            del request.attempts[attempt.key]
            del self._attempts[attempt.key]
        for worker_id in workers:
            if worker_id != skip and worker_id in self.placement.workers:
                self._commands.cancel(worker_id, attempt.key, () if is_over else choices)

    def _drop_finished(self, stream: _Stream, *, skip: str | None) -> None:
        choice = stream.choice
        if choice.finish_reason is not None and choice.choice in stream.attempt.streams:
            self._drop(stream.request, stream.attempt, (choice.choice,), skip=skip)

    def _end(self, request: ActiveRequest, now: float) -> None:
        request.ended_s = now
        self._deadlines.ended(request, now)
        del self.requests[request.wire_id]
        request.listener()

    def _backoff_s(self, setbacks: Setbacks) -> float:
        doublings = min(max(setbacks.num_given_back - 1, 0), 16)
        wait_s = self._settings.retry_backoff_s * 2.0**doublings
        return min(wait_s, self._settings.max_retry_backoff_s)

    def _new_stream_id(self) -> int:
        stream_id = (self._last_stream_id + 1) % _STREAM_IDS
        while stream_id in self._streams:
            stream_id = (stream_id + 1) % _STREAM_IDS
        self._last_stream_id = stream_id
        return stream_id
