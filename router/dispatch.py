"""Decide what happens to every request. Pure: events and the time come in, commands go out.

A request is a set of choices. Each choice is, until it finishes, either waiting (part of one
WaitingWork) or running (part of one Attempt); `attempt.TRANSITIONS` is the life of an attempt.
Events of workers name attempts by stream ids or keys; those of ended attempts are unknown here,
and so are dropped.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from paceline.errors import (
    DeadlineExceededError,
    PacelineError,
    RequestFailedError,
)
from paceline.request import AttemptKey, FailureReason, Span
from paceline.router.active_request import ActiveRequest, WaitingWork
from paceline.router.attempt import Attempt, AttemptEvent, AttemptState
from paceline.router.capacity import Need
from paceline.router.claims import Claims
from paceline.router.deadlines import Ahead, Deadlines
from paceline.router.placement import Placement
from paceline.router.queue import WaitingQueue
from paceline.router.request_size import (
    fix_max_tokens,
    need_of,
    too_large,
    too_large_to_go_on,
)
from paceline.router.route_health import RouteHealth
from paceline.router.running_work import RunningAttempt, RunningStream, RunningWork
from paceline.router.setbacks import Incarnation, Setbacks
from paceline.router.settings import RouterSettings
from paceline.router.suspects import Suspects
from paceline.router.worker_messages import TokenColumns, WorkerCommands
from paceline.router.worker_view import WorkerLoad, WorkerView

logger = logging.getLogger(__name__)

_MAX_COST = 256
"""Choices that one event may send or put back; the rest follows in the next turns of the event
loop. A choice takes up to 50 us."""

_TOKENS_OF_A_CHOICE = 512
"""Tokens that take as long to send as a choice does."""


def _nobody() -> None:
    pass


class Dispatcher:
    """The state of all requests of one router."""

    def __init__(
        self,
        settings: RouterSettings,
        commands: WorkerCommands,
        on_behind: Callable[[], None] = _nobody,
    ) -> None:
        """`on_behind` is called when work is left for the next turn of the event loop, in which
        `dispatch` must be called."""
        self._settings = settings
        self._on_behind = on_behind
        self.placement = Placement(RouteHealth(settings.first_rest_s, settings.max_rest_s))
        self.queue: WaitingQueue[WaitingWork] = WaitingQueue(settings.max_queue_requests)
        self._deadlines = Deadlines()
        self._suspects = Suspects()
        self.requests: dict[str, ActiveRequest] = {}
        """Not yet ended, by wire_id."""
        self.running = RunningWork(self.placement, self._suspects, commands)
        self._claims = Claims(commands)
        self._blocked: tuple[WaitingWork, Need] | None = None
        """The head of the queue, if the last dispatch found no room for it."""
        self._returning: deque[Iterator[int]] = deque()
        """Work that workers gave back or lost, and that is not in the queue yet: each step puts
        some of it back and yields the cost of that."""
        self._is_cut_short = False
        """Whether the last dispatch might have sent more."""

    @property
    def num_waiting(self) -> int:
        """Pieces of work that wait for workers."""
        return len(self.queue) + len(self._suspects)

    # Clients.

    def check_room(self, deadline_s: float, now: float, tenant: str = "") -> None:
        """Raise OverloadedError if no new request with this deadline can be taken, whatever it
        asks for."""
        self.queue.check_room()
        self._deadlines.check_wait(self._ahead(tenant), deadline_s, now)

    def submit(self, request: ActiveRequest, now: float) -> None:
        """Take a new request; raises InvalidRequestError if it fits no pool, and OverloadedError if
        the queue is full or too long for its deadline."""
        error = too_large(request, self.placement.pools)
        if error is not None:
            raise error
        tenant = request.journal.tenant
        self.queue.check_room()
        self._deadlines.take(request, self._ahead(tenant), now)
        choices = tuple(range(len(request.journal.choices)))
        work = WaitingWork(request, choices)
        self.queue.push_new(work, tenant)
        request.waiting[work] = None
        self.requests[request.wire_id] = request
        self.dispatch(now)

    def fail(self, request: ActiveRequest, error: PacelineError, now: float) -> None:
        """End a request early and free all that it held; does nothing if it has ended."""
        self._fail(request, error, now)
        self.dispatch(now)

    def expire(self, request: ActiveRequest, limit: str, now: float) -> None:
        """End a request whose deadline has passed; `limit` names it."""
        self._deadlines.expired(request, now)
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
        worker.dispatch_ahead_s = self._settings.dispatch_ahead_s
        self.placement.add(worker)
        self._deadlines.workers_changed()
        self.dispatch(now)

    def worker_lost(self, worker_id: str, now: float, *, is_planned: bool = False) -> None:
        """Put back all work that needed this worker; a death counts, a planned stop does not."""
        worker = self.placement.remove(worker_id)
        self._claims.forget(worker_id)
        if worker is None:
            return
        self._deadlines.workers_changed()
        is_planned = is_planned or worker.load.draining
        incarnation = Incarnation(worker_id, worker.member.incarnation)
        died = None if is_planned else incarnation
        lost = self.running.lose(worker_id)
        self._returning.append(self._put_back_lost(lost, worker_id, died, now))
        self.dispatch(now)

    def load_changed(self, worker_id: str, load: WorkerLoad, now: float) -> None:
        worker = self.placement.workers.get(worker_id)
        if worker is not None:
            self.placement.update(worker, load)
            if self.num_waiting:
                self.dispatch(now)
            if self.num_waiting and self._blocked is not None:
                self._claims.wait(worker, *self._blocked, now)
            else:
                self._claims.withdraw(worker)

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
        found = self.running.attempts.get(key)
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
        streams = self.running.streams
        logprobs = columns.logprobs
        touched: dict[ActiveRequest, None] = {}
        ended: list[RunningStream] = []
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
                self.running.drop_finished(stream, skip=worker_id if knows else None)
                touched[stream.request] = None
        for stream in ended:
            self.running.drop_finished(stream, skip=None)
        for request in touched:
            if request.first_token_s is None:
                request.first_token_s, request.first_token_lag_s = now, columns.lag_s
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
        by_attempt: dict[AttemptKey, list[RunningStream]] = {}
        for stream_id in stream_ids:
            stream = self.running.streams.get(stream_id)
            if stream is not None and worker_id in stream.attempt.workers():
                by_attempt.setdefault(stream.attempt.key, []).append(stream)
        given_back = list(by_attempt.values())
        self._returning.append(self._take_back(given_back, worker_id, reason, message, now))
        self.dispatch(now)

    def phase(self, key: AttemptKey, spans: Sequence[Span]) -> None:
        """Note where an attempt's time went on a worker."""
        found = self.running.attempts.get(key)
        if found is not None:
            found[0].add_spans(key.attempt, spans)

    # Time.

    @property
    def is_behind(self) -> bool:
        """Whether `dispatch` should be called again at once."""
        return bool(self._returning) or self._is_cut_short

    def dispatch(self, now: float) -> None:
        """Send waiting work as far as the workers have room, in the order of the queue.

        However much there is to do, one call does a bounded part of it. Work that comes back goes
        first, so that nothing behind it in the queue overtakes it.
        """
        self._blocked = None
        cost = self._go_on_putting_back()
        if not self._returning:
            self.placement.routes.wake(now)
            cost = self._dispatch_suspect(now, cost)
            cost = self._dispatch_queue(now, cost)
        self._is_cut_short = cost >= _MAX_COST
        if self.is_behind:
            self._on_behind()

    def next_timer_s(self, now: float) -> float | None:
        """Return when `dispatch` should be called though nothing happens; None: never."""
        if self.is_behind:
            return now
        times = self.queue.next_ready_s(now), self._suspects.next_ready_s(now)
        return min((at_s for at_s in times if at_s is not None), default=None)

    # How it is done. Costs are in choices that are sent or put back.

    def _ahead(self, tenant: str) -> Ahead:
        return Ahead(self.queue.num_ahead(tenant), len(self.queue))

    def _dispatch_queue(self, now: float, cost: int) -> int:
        pools = self.placement.pools
        while cost < _MAX_COST and (work := self.queue.head(now)) is not None:
            request = work.request
            need = need_of(work, pools)
            pair = self.placement.find(need)
            if pair is None:
                error = too_large_to_go_on(work, pools)
                if error is None:
                    self._deadlines.queue_waits(now)
                    self._blocked = (work, need)
                    return cost
                self._fail(request, error, now)
                cost += need.num_choices
                continue
            pending_tokens = pair.num_pending_tokens
            late = self._deadlines.why_too_late(work, pending_tokens, need.num_tokens, now)
            if late is not None:
                self._fail(request, late, now)
                cost += need.num_choices
                continue
            self._deadlines.sent(work, pending_tokens, need.num_tokens, now)
            self.queue.pop(now)
            del request.waiting[work]
            fix_max_tokens(request, pools)
            self._claims.sent(pair, self.placement.workers)
            self.placement.dispatch(pair, need)
            self.running.send(work, pair, now)
            cost += need.num_choices + need.num_tokens // _TOKENS_OF_A_CHOICE
        if cost < _MAX_COST:
            self._deadlines.queue_is_empty()
        return cost

    def _dispatch_suspect(self, now: float, cost: int) -> int:
        """Send the next suspect when the one before has given a token, to workers that run nothing
        else without a token."""
        while self._suspects.running is None and cost < _MAX_COST:
            work = self._suspects.head(now)
            if work is None:
                self.placement.release()
                break
            need = need_of(work, self.placement.pools)
            pair = self.placement.reserve(need)
            if pair is not None:
                self._suspects.remove(work)
                del work.request.waiting[work]
                self._claims.sent(pair, self.placement.workers)
                self.placement.dispatch(pair, need)
                self._suspects.running = self.running.send(work, pair, now)
                return cost + need.num_choices
            error = too_large_to_go_on(work, self.placement.pools)
            if error is None:
                break
            self._fail(work.request, error, now)
            cost += need.num_choices
        return cost

    def _go_on_putting_back(self) -> int:
        cost = 0
        while self._returning and cost < _MAX_COST:
            step = next(self._returning[0], None)
            if step is None:
                self._returning.popleft()
            else:
                cost += step
        return cost

    def _put_back_lost(
        self, lost: list[RunningAttempt], worker_id: str, died: Incarnation | None, now: float
    ) -> Iterator[int]:
        """Put back, step by step, what cannot go on without a worker that has gone."""
        for request, attempt in lost:
            if attempt.state is AttemptState.ENDED:  # since, or its request failed
                continue
            setbacks = attempt.setbacks
            if died is not None:
                is_alone = attempt.key == self._suspects.running
                setbacks = setbacks.after_death(died, is_alone=is_alone)
            choices = tuple(attempt.streams)
            self.running.drop(request, attempt, choices, skip=worker_id)
            self._put_back(request, choices, setbacks, now, not_before_s=now)
            yield len(choices)

    def _take_back(
        self,
        given_back: list[list[RunningStream]],
        worker_id: str,
        reason: FailureReason,
        message: str,
        now: float,
    ) -> Iterator[int]:
        """Take back, step by step, choices with which a worker cannot go on, by attempt."""
        for streams in given_back:
            request, attempt, _ = streams[0]
            choices = tuple(s.choice.choice for s in streams if s.choice.choice in attempt.streams)
            if choices:  # else ended since, or its request failed
                self._give_back(request, attempt, choices, worker_id, reason, message, now)
                yield len(choices)

    def _fail(self, request: ActiveRequest, error: PacelineError, now: float) -> None:
        if request.is_done:
            return
        request.error = error
        for attempt in list(request.attempts.values()):
            self.running.drop(request, attempt, tuple(attempt.streams), skip=None)
        for work in request.waiting:
            self._suspects.remove(work)
            self.queue.remove(work, request.journal.tenant)
        request.waiting.clear()
        self._end(request, now)

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
        self.running.drop(request, attempt, choices, skip=worker_id)
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
            routes.worked(attempt.route)
        if self.running.decode_token(attempt, index):
            for worker_id in attempt.route:
                routes.worked((worker_id,))

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
            request.waiting[work] = None
            if setbacks.is_suspect(self._settings):
                self._suspects.push(work, not_before_s)
            else:
                self.queue.push_resumed(work, request.arrived_s, not_before_s)

    def _end(self, request: ActiveRequest, now: float) -> None:
        request.ended_s = now
        self._deadlines.ended(request, now)
        del self.requests[request.wire_id]
        request.listener()

    def _backoff_s(self, setbacks: Setbacks) -> float:
        doublings = min(max(setbacks.num_given_back - 1, 0), 16)
        wait_s = self._settings.retry_backoff_s * 2.0**doublings
        return min(wait_s, self._settings.max_retry_backoff_s)
