"""Pure workers for tests of the dispatcher: messages wait until the test delivers them.

A killed worker's lines are gone at once, in both directions, as with a broken stream.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fake_worker import BLOCK_TOKENS, Oracle

from paceline.request import (
    AttemptKey,
    FailureReason,
    FinishReason,
    Work,
    num_blocks_for,
    num_blocks_promised,
)
from paceline.router.capacity import WorkerPool
from paceline.router.dispatch import Dispatcher
from paceline.router.settings import RouterSettings
from paceline.router.worker_messages import TokenColumns, WorkerClaim
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView

POISON = "poison"
"""How names of requests begin that kill the decode worker that computes a token for them."""


@dataclass
class _Held:
    work: Work
    has_source: bool
    outputs: dict[int, list[int]]


@dataclass
class SimulatedWorker:
    """One worker; `step` computes, `deliver_*` carry one message each way."""

    member: WorkerMember
    num_blocks: int
    max_num_seqs: int
    cluster: "SimulatedCluster"
    inbox: deque[Callable[[], None]] = field(default_factory=deque)
    outbox: deque[Callable[[float], None]] = field(default_factory=deque)
    held: dict[AttemptKey, _Held] = field(default_factory=dict)
    num_seen: int = 0
    refuses: bool = False
    gives_back: FailureReason | None = None
    """How it ends all that it is sent, at once."""

    @property
    def worker_id(self) -> str:
        return self.member.worker_id

    @property
    def num_held_blocks(self) -> int:
        return sum(self._blocks(held.work) for held in self.held.values())

    @property
    def num_sequences(self) -> int:
        return sum(len(held.outputs) for held in self.held.values())

    def load(self) -> WorkerLoad:
        free = self.num_blocks - self.num_held_blocks
        return WorkerLoad(free, self.max_num_seqs - self.num_sequences, self.num_seen)

    def take(self, work: Work, has_source: bool) -> None:
        self.num_seen += 1
        if self.gives_back is not None:
            self.cluster.num_broken_attempts += 1
        refuses = self.refuses or self.gives_back is FailureReason.REFUSED
        message = "scripted" if refuses else None
        if message is None:
            outputs = {choice: work.output.tolist() for choice in work.choices}
            self.held[work.key] = _Held(work, has_source, outputs)
            assert self.num_held_blocks <= self.num_blocks, "the router overdrew its credit"
            assert self.num_sequences <= self.max_num_seqs, "the router overdrew its credit"
        dispatcher = self.cluster.dispatcher
        self.outbox.append(
            lambda now: dispatcher.admission(self.worker_id, work.key, message, 0, now)
        )
        if message is None and self.gives_back is not None:
            self.end_all(work, self.gives_back, "scripted")
        elif message is None and self.cluster.is_broken(self, work.key):
            self.cluster.num_broken_attempts += 1
            self.end_all(work, FailureReason.LEASE_LOST, "cannot connect")
        self._report_load()

    def end_all(self, work: Work, reason: FailureReason, message: str) -> None:
        """Give all choices back."""
        del self.held[work.key]
        dispatcher = self.cluster.dispatcher
        self.outbox.append(
            lambda now: dispatcher.failure(self.worker_id, work.stream_ids, reason, message, now)
        )

    def cancel(self, key: AttemptKey, choices: tuple[int, ...]) -> None:
        held = self.held.get(key)
        if held is None:
            return
        for choice in choices or tuple(held.outputs):
            held.outputs.pop(choice, None)
        if held.has_source and not held.outputs:
            self.cluster.over.add(key)  # its reader gives the lease back
        self._forget_empty(key)

    @property
    def is_poisoned(self) -> bool:
        """Whether its next step would be its last."""
        return any(
            key.request_id.startswith(POISON)
            and (not held.has_source or key in self.cluster.over)  # not while it only imports
            for key, held in self.held.items()
            if self.member.role is Role.DECODE
        )

    def step(self) -> None:
        rows: list[tuple[int, int, int]] = []
        finished: list[tuple[int, FinishReason]] = []
        for key, held in list(self.held.items()):
            if self.member.role is Role.PREFILL:
                if key in self.cluster.first_tokens:
                    if key in self.cluster.over:
                        del self.held[key]
                    continue
                self._emit(held, rows, finished)
                self.cluster.first_tokens.add(key)
            else:
                if held.has_source and key not in self.cluster.first_tokens:
                    continue
                if held.has_source:
                    self.cluster.over.add(key)
                self._emit(held, rows, finished)
                self._forget_empty(key)
        if rows:
            streams, indices, tokens = zip(*rows, strict=True)
            columns = TokenColumns(streams, indices, tokens, finished)
            dispatcher = self.cluster.dispatcher
            self.outbox.append(lambda now: dispatcher.tokens(self.worker_id, columns, now))
        self._report_load()

    def fail(self, pick: int, reason: FailureReason) -> None:
        """Give back one choice."""
        streams = [
            (key, choice, stream_id)
            for key, held in self.held.items()
            for choice, stream_id in zip(held.work.choices, held.work.stream_ids, strict=True)
            if choice in held.outputs
        ]
        if streams:
            key, choice, stream_id = streams[pick % len(streams)]
            del self.held[key].outputs[choice]
            self._forget_empty(key)
            dispatcher = self.cluster.dispatcher
            self.outbox.append(
                lambda now: dispatcher.failure(self.worker_id, [stream_id], reason, "scripted", now)
            )
            self._report_load()

    def _emit(
        self,
        held: _Held,
        rows: list[tuple[int, int, int]],
        finished: list[tuple[int, FinishReason]],
    ) -> None:
        work = held.work
        for choice, stream_id in zip(work.choices, work.stream_ids, strict=True):
            output = held.outputs.get(choice)
            if output is None:
                continue
            token = self.cluster.oracle(work.prompt.tolist(), output, choice)
            rows.append((stream_id, len(output), token))
            output.append(token)
            if len(output) == work.sampling.max_tokens:
                finished.append((stream_id, FinishReason.LENGTH))
                if self.member.role is Role.DECODE:
                    del held.outputs[choice]

    def _forget_empty(self, key: AttemptKey) -> None:
        if not self.held[key].outputs:
            del self.held[key]

    def _report_load(self) -> None:
        load = self.load()
        dispatcher = self.cluster.dispatcher
        self.outbox.append(lambda now: dispatcher.load_changed(self.worker_id, load, now))

    def _blocks(self, work: Work) -> int:
        if self.member.role is Role.PREFILL:
            return num_blocks_for(work.num_tokens, BLOCK_TOKENS)
        return num_blocks_promised(work.num_tokens, len(work.choices), BLOCK_TOKENS)


class SimulatedCluster:
    """A dispatcher and its workers; implements the dispatcher's commands."""

    def __init__(self, oracle: Oracle, settings: RouterSettings | None = None) -> None:
        self.oracle = oracle
        self.dispatcher = Dispatcher(settings or RouterSettings(), self)
        self.workers: dict[str, SimulatedWorker] = {}
        self.first_tokens: set[AttemptKey] = set()
        self.over: set[AttemptKey] = set()
        """Attempts whose lease the reader has confirmed or given back."""
        self.sent: list[tuple[str, Work]] = []
        self.broken_pairs: set[tuple[str, str]] = set()
        """(prefill, decode): the decode worker cannot connect, and says so at once."""
        self.num_broken_attempts = 0
        self.sources: dict[AttemptKey, str] = {}
        self.cancels: list[tuple[str, AttemptKey, tuple[int, ...]]] = []
        self._incarnations = 0

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        self.sent.append((worker_id, work))
        worker = self.workers[worker_id]
        worker.inbox.append(lambda: worker.take(work, False))

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        self.sent.append((worker_id, work))
        worker = self.workers[worker_id]
        if source is not None:
            self.sources[work.key] = source.worker_id
        worker.inbox.append(lambda: worker.take(work, source is not None))

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        """There is no other router that could be offered less."""

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        self.cancels.append((worker_id, key, choices))
        worker = self.workers[worker_id]
        worker.inbox.append(lambda: worker.cancel(key, choices))

    def join(
        self,
        worker_id: str,
        role: Role,
        now: float,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        local_prefill_tokens: int = 0,
    ) -> SimulatedWorker:
        self._incarnations += 1
        member = WorkerMember(worker_id, role, self._incarnations, "")
        worker = SimulatedWorker(member, num_blocks, max_num_seqs, self)
        self.workers[worker_id] = worker
        pool = WorkerPool(num_blocks, BLOCK_TOKENS, max_num_seqs, local_prefill_tokens)
        self.dispatcher.worker_joined(WorkerView(member, pool, worker.load()), now)
        return worker

    def is_broken(self, reader: SimulatedWorker, key: AttemptKey) -> bool:
        if reader.member.role is Role.PREFILL:
            return False
        return (self.sources.get(key), reader.worker_id) in self.broken_pairs

    def pass_time(self, now: float, seconds: float) -> float:
        self.dispatcher.dispatch(now + seconds)
        return now + seconds

    def catch_up(self, now: float) -> int:
        """Give the dispatcher turns of the event loop while it asks for them; return how many."""
        num_turns = 0
        while self.dispatcher.is_behind:
            assert self.dispatcher.next_timer_s(now) == now
            self.dispatcher.dispatch(now)
            num_turns += 1
        return num_turns

    def kill_poisoned(self, now: float) -> list[str]:
        """Let the decode workers die that would compute a token of a poisonous request."""
        victims = [w.worker_id for w in self.workers.values() if w.is_poisoned]
        for worker_id in victims:
            self.kill(worker_id, now)
        return victims

    def kill(self, worker_id: str, now: float) -> None:
        del self.workers[worker_id]
        self.dispatcher.worker_lost(worker_id, now)

    def deliver_all(self, now: float) -> None:
        """Carry every message, both ways, until none is left."""
        while any(worker.inbox or worker.outbox for worker in self.workers.values()):
            for worker in list(self.workers.values()):
                while worker.inbox:
                    worker.inbox.popleft()()
                while worker.outbox:
                    worker.outbox.popleft()(now)

    def run(self, now: float, num_steps: int) -> float:
        """Step all workers and deliver everything; return the time then."""
        for _ in range(num_steps):
            self.deliver_all(now)
            for worker in self.workers.values():
                worker.step()
            self.deliver_all(now)
            now += 1.0
            self.dispatcher.dispatch(now)
        return now
