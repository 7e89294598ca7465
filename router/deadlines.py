"""Which requests can still meet their deadline: refused at the door, dropped from the queue. Pure.

Under overload a router that takes everything gives the workers requests whose time has run out in
the queue, and hardly any is answered. Here it learns how fast work goes (`estimates.py`) and gives
the workers what can still be answered in time.

An estimate can be wrong. So one request a second gets through whatever the estimate says, is
measured, and corrects it.
"""

import math
from typing import NamedTuple

from paceline.errors import DeadlineExceededError, OverloadedError
from paceline.router.active_request import ActiveRequest, WaitingWork
from paceline.router.estimates import QueuePace, RunningMean, ServiceTimes

PROBE_S = 1.0
"""Without any request let through for this long, the next one is."""
_QUEUED_SHARE = 0.8
"""Of its time, which a request that has to wait must be expected to need at most. A short queue
keeps the workers as busy as a long one, and leaves time for what the estimate does not see."""
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 30.0


class Ahead(NamedTuple):
    """What leaves the queue before a new request."""

    num_requests: int
    num_waiting: int
    """Requests in the whole queue"""


class Deadlines:
    """Judge requests by their deadlines, and learn from what becomes of them."""

    def __init__(self) -> None:
        self._pace = QueuePace()
        self._times = ServiceTimes()
        self._pending_tokens = RunningMean()
        """At the worker to which a prompt was sent, before it."""
        self._num_waiting_tokens = 0
        """Of prompts in the queue that have never been dispatched."""
        self._taken_s = self._sent_s = -math.inf

    # Judgements.

    def take(self, request: ActiveRequest, ahead: Ahead, now: float) -> None:
        """Take a new request into the queue, or raise OverloadedError with the numbers."""
        num_tokens = len(request.journal.prompt)
        pending_tokens = self._pending_tokens.value if ahead.num_requests else None
        service_s = self._service_s(request, (pending_tokens or 0.0) + num_tokens)
        self._check(ahead, service_s, request.deadline_s, now)
        self._taken_s = now
        self._num_waiting_tokens += num_tokens

    def check_wait(self, ahead: Ahead, deadline_s: float, now: float) -> None:
        """Raise OverloadedError if the wait in the queue would be too long for any request with
        this deadline: called before the work of tokenizing."""
        self._check(ahead, 0.0, deadline_s, now)

    def _check(self, ahead: Ahead, service_s: float, deadline_s: float, now: float) -> None:
        wait_s = self._wait_s(ahead)
        left_s = deadline_s - now
        limit_s = left_s * _QUEUED_SHARE if wait_s else left_s
        excess_s = wait_s + service_s - limit_s
        if excess_s > 0 and now - self._taken_s < PROBE_S:
            retry_s = min(max(excess_s, _MIN_RETRY_S), _MAX_RETRY_S)
            raise OverloadedError(
                f"the request would wait about {wait_s:.2f} s behind {ahead.num_requests} others "
                f"and then run for {service_s:.2f} s or more, by what those before it took; its "
                f"deadline leaves {left_s:.2f} s, and at most {limit_s:.2f} s may be planned. Try "
                f"again in about {retry_s:.1f} s, allow more time (timeout_s), lower max_tokens, "
                "or add workers",
                retry_after_s=retry_s,
            )

    def _wait_s(self, ahead: Ahead) -> float:
        if not ahead.num_requests:
            return 0.0
        share = ahead.num_requests / ahead.num_waiting
        return self._pace.wait_s(ahead.num_requests, share * self._num_waiting_tokens) or 0.0

    def why_too_late(
        self, work: WaitingWork, pending_tokens: int, num_tokens: int, now: float
    ) -> DeadlineExceededError | None:
        """Say why work that could be dispatched now would not end in time; `pending_tokens` wait at
        the worker that would compute its `num_tokens`. Work that ran before always goes on."""
        request = work.request
        if request.first_dispatch_s is not None or now - self._sent_s >= PROBE_S:
            return None
        service_s = self._service_s(request, pending_tokens + num_tokens)
        left_s = request.deadline_s - now
        if service_s <= left_s:
            return None
        return DeadlineExceededError(
            f"the request has waited {now - request.arrived_s:.2f} s in the queue, its deadline "
            f"leaves {left_s:.2f} s, and it would run for about {service_s:.2f} s, by what those "
            "before it took; it was dropped before it cost the workers anything. Allow more time "
            "(timeout_s), lower max_tokens, or add workers"
        )

    def _service_s(self, request: ActiveRequest, num_tokens: float) -> float:
        decode_s = self._times.decode_s(
            request.journal.max_tokens, is_open=request.max_tokens_is_default
        )
        return self._times.first_token_s(num_tokens) + decode_s

    # What becomes of requests.

    def workers_changed(self) -> None:
        """Forget the pace of the queue: there may be more workers now."""
        self._pace.forget()

    def queue_waits(self, now: float) -> None:
        self._pace.waits(now)

    def queue_is_empty(self) -> None:
        self._pace.is_empty()

    def sent(self, work: WaitingWork, pending_tokens: int, num_tokens: int, now: float) -> None:
        """Note work that is about to be dispatched, with the numbers that were judged."""
        request = work.request
        self._sent_s = now
        self._pace.left(num_tokens, now)
        if request.first_dispatch_s is None:
            self._num_waiting_tokens -= len(request.journal.prompt)
            self._pending_tokens.add(pending_tokens, now)
            request.tokens_until_first = pending_tokens + num_tokens

    def first_token(self, request: ActiveRequest, now: float) -> None:
        """Note a request's first token; one that was dispatched again says nothing."""
        if request.num_attempts == 1 and request.first_dispatch_s is not None:
            took_s = now - request.first_dispatch_s
            self._times.note_first_token(request.tokens_until_first, took_s, now)

    def expired(self, request: ActiveRequest, now: float) -> None:
        """Note a request whose deadline passes. If its first token should have come by now, the
        estimate is too low; those that are answered would never say so."""
        if request.first_dispatch_s is None or request.first_token_s is not None:
            return
        waited_s = now - request.first_dispatch_s
        is_running = request.num_attempts == 1 and bool(request.attempts)
        if is_running and waited_s > self._times.first_token_s(request.tokens_until_first):
            self._times.note_first_token(request.tokens_until_first, waited_s, now)

    def ended(self, request: ActiveRequest, now: float) -> None:
        """Note the end of a request that was taken."""
        journal = request.journal
        dispatched, first, last = (
            request.first_dispatch_s,
            request.first_token_s,
            request.last_token_s,
        )
        if dispatched is None:
            self._num_waiting_tokens -= len(journal.prompt)
            return
        for choice in journal.choices:
            if choice.finish_reason is not None:
                self._times.note_output(
                    len(choice.output),
                    journal.max_tokens,
                    is_open=request.max_tokens_is_default,
                    now=now,
                )
        if request.num_attempts != 1 or first is None or last is None:
            return
        num_steps = max(len(choice.output) for choice in journal.choices) - 1
        if num_steps > 0:
            self._times.note_inter_token((last - first) / num_steps, now)
