"""The attempts that may still bring tokens, by key, by stream and by worker. Pure."""

from typing import NamedTuple

from paceline.request import AttemptKey, Work
from paceline.router.active_request import ActiveRequest, WaitingWork
from paceline.router.attempt import Attempt, AttemptEvent
from paceline.router.journal import ChoiceJournal
from paceline.router.placement import Placement
from paceline.router.suspects import Suspects
from paceline.router.worker_messages import WorkerCommands
from paceline.router.worker_view import Pair

_STREAM_IDS = 2**32


class RunningAttempt(NamedTuple):
    """An attempt and whose it is."""

    request: ActiveRequest
    attempt: Attempt


class RunningStream(NamedTuple):
    """One choice of an attempt."""

    request: ActiveRequest
    attempt: Attempt
    choice: ChoiceJournal


class RunningWork:
    """Sends work to workers, and forgets it there when it is over."""

    def __init__(self, placement: Placement, suspects: Suspects, commands: WorkerCommands) -> None:
        self._placement = placement
        self._suspects = suspects
        self._commands = commands
        self.streams: dict[int, RunningStream] = {}
        self.attempts: dict[AttemptKey, RunningAttempt] = {}
        self._by_worker: dict[str, dict[AttemptKey, RunningAttempt]] = {}
        """Those that cannot go on without a worker."""
        self._last_stream_id = 0

    def send(self, work: WaitingWork, pair: Pair, now: float) -> AttemptKey:
        """Start an attempt at a pair of workers."""
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
        running = RunningAttempt(request, attempt)
        request.attempts[key] = attempt
        self.attempts[key] = running
        for worker in pair.views:
            worker.without_token.add(key)
            self._by_worker.setdefault(worker.worker_id, {})[key] = running
        for choice, stream_id in streams.items():
            self.streams[stream_id] = RunningStream(request, attempt, journal.choices[choice])
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

    def lose(self, worker_id: str) -> list[RunningAttempt]:
        """Return the attempts that cannot go on because a worker has gone. They stay here until
        they are dropped, but no longer count as its own."""
        return list(self._by_worker.pop(worker_id, {}).values())

    def decode_token(self, attempt: Attempt, index: int) -> bool:
        """Note a token of the decode worker; say whether it is the first of its own."""
        if attempt.prefill_id is not None:
            self._no_longer_needs(attempt.prefill_id, attempt.key)
        attempt.decode_token(index)
        if attempt.has_own_token:
            self._no_longer_without_token(attempt)
        return attempt.has_own_token

    def drop(
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
            del self.streams[attempt.streams.pop(choice)]
            request.journal.choices[choice].forget_early()
        is_over = not attempt.streams
        if is_over:
            attempt.move(AttemptEvent.LAST_CHOICE_GONE)
            self._placement.routes.ended(attempt.prefill_id, attempt.decode_id)
            self._no_longer_without_token(attempt)
            for worker_id in workers:
                self._no_longer_needs(worker_id, attempt.key)
            del request.attempts[attempt.key]
            del self.attempts[attempt.key]
        for worker_id in workers:
            if worker_id != skip and worker_id in self._placement.workers:
                self._commands.cancel(worker_id, attempt.key, () if is_over else choices)

    def drop_finished(self, stream: RunningStream, *, skip: str | None) -> None:
        """Forget a choice if it has its last token."""
        choice = stream.choice
        if choice.finish_reason is not None and choice.choice in stream.attempt.streams:
            self.drop(stream.request, stream.attempt, (choice.choice,), skip=skip)

    def _no_longer_needs(self, worker_id: str, key: AttemptKey) -> None:
        attempts = self._by_worker.get(worker_id)
        if attempts is not None:
            attempts.pop(key, None)
            if not attempts:
                del self._by_worker[worker_id]

    def _no_longer_without_token(self, attempt: Attempt) -> None:
        """Note that an attempt has given a token, or has ended."""
        for worker_id in attempt.route:
            worker = self._placement.workers.get(worker_id)
            if worker is not None:
                worker.without_token.discard(attempt.key)
        if self._suspects.running == attempt.key:
            self._suspects.running = None
            self._placement.release()

    def _new_stream_id(self) -> int:
        stream_id = (self._last_stream_id + 1) % _STREAM_IDS
        while stream_id in self.streams:
            stream_id = (stream_id + 1) % _STREAM_IDS
        self._last_stream_id = stream_id
        return stream_id
