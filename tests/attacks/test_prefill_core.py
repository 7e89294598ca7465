"""What routers and readers may legally say to a prefill worker must not end its engine thread."""

from collections.abc import Sequence

import numpy as np
from prefill_simulation import PrefillSimulation, make_work

from paceline.failpoints import Failpoints
from paceline.kv_transfer.lease import Lease, LeaseState, LeaseTable
from paceline.prefill_worker.core import PrefillCore
from paceline.request import AttemptKey, FailureReason, Span
from paceline.sampling_params import SamplingParams
from paceline.worker.core import Peer
from paceline.worker.step_output import StepOutput

READER = Peer("decode-0", 1, "127.0.0.1:1")
PROMPT = list(range(100, 140))


class Routers:
    """Writes down what the core answers."""

    def __init__(self) -> None:
        self.admissions: list[tuple[AttemptKey, bool, str]] = []
        self.failures: list[tuple[int, ...]] = []
        self.tokens: list[tuple[int, int]] = []

    def send_admission(
        self, session: int, key: AttemptKey, *, admitted: bool, message: str, cached_tokens: int
    ) -> None:
        self.admissions.append((key, admitted, message))

    def send_output(self, session: int, output: StepOutput) -> None:
        columns = (output.stream_ids.tolist(), output.token_ids.tolist())
        self.tokens += zip(*columns, strict=True)

    def send_failure(
        self, session: int, stream_ids: tuple[int, ...], reason: FailureReason, message: str
    ) -> None:
        self.failures.append(stream_ids)

    def send_phase(
        self, session: int, key: AttemptKey, spans: list[Span], kv_bytes: int, transport: str
    ) -> None:
        pass


class Worker:
    """A prefill core, stepped by hand."""

    def __init__(self, num_blocks: int = 64) -> None:
        self.simulation = PrefillSimulation(num_blocks=num_blocks)
        self.allocator = self.simulation.allocator
        self.leases = LeaseTable(self.allocator, ttl_s=5.0)
        self.routers = Routers()
        self.core = PrefillCore(
            self.simulation.scheduler,  # type: ignore[arg-type]
            self.leases,
            self.routers,
            Failpoints(),
            worker_id="prefill-0",
            unix_offset_s=0.0,
        )
        self.changed: list[Lease] = []
        self.core.notify_changed = self.changed.append
        self.now = 0.0

    def dispatch(
        self,
        attempt: int,
        *,
        choices: Sequence[int] = (0,),
        prompt: Sequence[int] = tuple(PROMPT),
        max_tokens: int = 20,
        request_id: str = "r",
        session: int = 1,
    ) -> AttemptKey:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1)
        work = make_work(
            request_id, prompt, attempt=attempt, choices=tuple(choices), sampling=sampling
        )
        self.core.dispatch(session, work, READER, self.now)
        return work.key

    def round(self, *, with_tick: bool = True) -> None:
        self.now += 0.01
        if with_tick:
            self.core.tick(self.now)
        plan = self.core.plan(self.now)
        if plan is not None:
            handle = self.simulation.runner.launch(plan)
            self.core.apply(handle.result(), self.now)
        self.core.check_integrity()

    def run(self) -> None:
        while self.simulation.scheduler.has_work:
            self.round()

    def confirm(self, key: AttemptKey) -> bool:
        lease = self.leases.find(key)
        assert lease is not None
        return self.leases.confirm(lease.lease_id, READER.name, self.now)

    def assert_empty(self) -> None:
        self.round()
        assert self.core.is_idle
        assert self.allocator.num_available == self.allocator.num_blocks
        assert self.leases.num_undecided == 0


def test_dispatch_repeated_between_confirmation_and_the_next_step_harms_nobody() -> None:
    worker = Worker()
    key = worker.dispatch(1)
    worker.run()
    assert worker.confirm(key)  # on the io thread, in the middle of a step
    # In one drain of the mailbox: the router gives the attempt up, and its messages come twice.
    worker.core.cancel(1, key, (), worker.now)
    worker.dispatch(1)
    worker.run()  # `tick` settles the first lease, and must not forget the second attempt
    assert worker.routers.admissions[-1][1]
    worker.core.cancel(1, key, (), worker.now)
    worker.assert_empty()


def test_idle_worker_offers_its_whole_pool_to_each_of_two_routers() -> None:
    """Else a prompt of more than half the pool is never dispatched while two routers live."""
    worker = Worker(num_blocks=64)
    assert worker.core.is_idle
    assert worker.core.load().credit_blocks == 64
    worker.dispatch(1)
    assert worker.core.load().credit_blocks < 64


def test_choices_cancelled_one_by_one_after_the_last_chunk_leave_no_lease() -> None:
    """A router that stops each choice of its own accord names them one at a time."""
    worker = Worker()
    key = worker.dispatch(1, choices=(0, 1))
    worker.run()
    worker.core.cancel(1, key, (0,), worker.now)
    assert worker.leases.num_undecided == 1
    worker.core.cancel(1, key, (1,), worker.now)
    worker.assert_empty()


def test_choices_cancelled_one_by_one_while_computing_leave_nothing() -> None:
    worker = Worker()
    prompt = list(range(100, 300))
    key = worker.dispatch(1, choices=(0, 1, 2), prompt=prompt)
    worker.round()
    for choice in (1, 0, 2):
        worker.core.cancel(1, key, (choice,), worker.now)
    lease = worker.leases.find(key)
    assert lease is not None
    assert lease.state is LeaseState.REVOKED
    worker.assert_empty()


def test_newer_attempt_of_some_choices_ends_the_older_and_a_late_older_one_is_refused() -> None:
    worker = Worker()
    old = worker.dispatch(1, choices=(0, 1))
    worker.round()
    new = worker.dispatch(2, choices=(1,))
    lease = worker.leases.find(old)
    assert lease is not None
    assert lease.state is LeaseState.REVOKED
    worker.dispatch(1, choices=(0, 1))
    assert worker.routers.admissions[-1][:2] == (old, False)
    worker.run()
    assert worker.confirm(new)
    worker.assert_empty()


def test_lost_reader_session_between_confirm_and_settle_keeps_the_verdict() -> None:
    worker = Worker()
    key = worker.dispatch(1)
    worker.run()
    assert worker.confirm(key)
    worker.core.reader_lost(READER.name, worker.now)
    worker.core.released(READER.name, key, worker.now)
    assert worker.confirm(key)
    assert not worker.routers.failures
    worker.assert_empty()


def test_lease_that_expires_while_its_prompt_is_computed_frees_all_and_tells_the_router() -> None:
    worker = Worker()
    key = worker.dispatch(1, prompt=list(range(100, 400)))
    worker.round()
    worker.now += 6.0
    worker.core.tick(worker.now)
    assert worker.routers.failures == [(100,)]
    assert not worker.confirm(key)
    worker.assert_empty()


def test_a_prompt_without_a_first_token_fails_alone_and_its_router_hears_why() -> None:
    worker = Worker()
    worker.simulation.runner.has_no_token = lambda tokens, index: tokens[0] == 13
    bad = worker.dispatch(1, prompt=[13] * 40, request_id="bad", choices=(0, 1))
    good = worker.dispatch(1, request_id="good")
    worker.run()
    assert worker.routers.failures == [(100, 101)]
    assert len(worker.routers.tokens) == 1
    lease = worker.leases.find(bad)
    assert lease is not None
    assert lease.state is LeaseState.REVOKED
    assert "nan" in lease.reason
    assert worker.simulation.prefix_cache.num_matching_blocks(np.full(40, 13, np.int32), "") == 0
    assert worker.confirm(good)
    worker.assert_empty()


def test_a_session_can_neither_cancel_nor_replace_the_work_of_another() -> None:
    worker = Worker()
    key = worker.dispatch(1)
    worker.core.cancel(2, key, (), worker.now)
    for attempt, choices in ((1, (0,)), (2, (0,)), (1, (1,))):
        worker.dispatch(attempt, choices=choices, session=2)
        _, admitted, message = worker.routers.admissions[-1]
        assert not admitted
        assert message == "another session has work here under the name r"
    worker.core.end_session(2, worker.now)
    worker.run()
    assert worker.confirm(key)
    worker.assert_empty()


def test_a_reader_can_release_only_its_own_leases() -> None:
    worker = Worker()
    key = worker.dispatch(1)
    worker.core.released("decode-1.1", key, worker.now)
    worker.run()
    assert worker.confirm(key)
    worker.assert_empty()
