"""Requests that cannot meet their deadline are refused or dropped before they cost anything, and no
wrong estimate locks everybody out."""

import pytest
from fake_worker import arithmetic_oracle
from router_requests import make_active_request
from simulated_pair import SimulatedCluster

from paceline.errors import DeadlineExceededError, OverloadedError
from paceline.router.active_request import ActiveRequest
from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL
from paceline.router.deadlines import PROBE_S
from paceline.router.worker_view import Role

STEP_S = 0.1
MAX_TOKENS = 10
NUM_SLOTS = 4
SERVICE_S = MAX_TOKENS * STEP_S
CAPACITY_PER_S = NUM_SLOTS / SERVICE_S


class World:
    """One decode worker with four slots, whose steps take 0.1 s."""

    def __init__(self) -> None:
        self.cluster = SimulatedCluster(arithmetic_oracle(500))
        self.now = 0.0
        self.requests: list[ActiveRequest] = []
        self.num_refused = 0

    @property
    def num_good(self) -> int:
        return sum(r.is_done and r.error is None for r in self.requests)

    def join(self, number: int = 0) -> None:
        self.cluster.join(
            f"decode-{number}",
            Role.DECODE,
            self.now,
            num_blocks=1000,
            max_num_seqs=NUM_SLOTS,
            local_prefill_tokens=UNLIMITED_LOCAL_PREFILL,
        )

    def submit(self, timeout_s: float, *, max_tokens: int = MAX_TOKENS) -> ActiveRequest:
        """Send a request; raises OverloadedError."""
        request = make_active_request(
            str(len(self.requests)), max_tokens=max_tokens, arrived_s=self.now
        )
        request.deadline_s = self.now + timeout_s
        self.cluster.dispatcher.submit(request, self.now)
        self.requests.append(request)
        return request

    def submit_many(self, num: int, timeout_s: float) -> None:
        for _ in range(num):
            self.submit(timeout_s)

    def step(self) -> None:
        """Let a step's time pass, and deadlines with it."""
        self.cluster.deliver_all(self.now)
        self.now += STEP_S
        for worker in self.cluster.workers.values():
            worker.step()
        self.cluster.deliver_all(self.now)
        for request in list(self.cluster.dispatcher.requests.values()):
            if request.deadline_s <= self.now:
                self.cluster.dispatcher.expire(request, "its deadline", self.now)

    def offer(self, per_s: float, seconds: float, timeout_s: float) -> None:
        """Send requests at a rate for a time."""
        end_s, due = self.now + seconds, 0.0
        while self.now < end_s:
            due += per_s * STEP_S
            while due >= 1:
                due -= 1
                try:
                    self.submit(timeout_s)
                except OverloadedError:
                    self.num_refused += 1
            self.step()


@pytest.fixture
def world() -> World:
    world = World()
    world.join()
    return world


def test_goodput_at_five_times_the_load_is_nearly_that_at_capacity(world: World) -> None:
    world.offer(CAPACITY_PER_S, 10.0, 4.0)
    world.offer(5 * CAPACITY_PER_S, 10.0, 4.0)  # until the pace is known and the queue is short
    num_before, refused_before = world.num_good, world.num_refused
    world.offer(5 * CAPACITY_PER_S, 20.0, 4.0)
    assert world.num_good - num_before >= 0.9 * CAPACITY_PER_S * 20
    assert world.num_refused - refused_before > 3 * CAPACITY_PER_S * 20


def test_after_an_overload_nothing_is_refused(world: World) -> None:
    world.offer(5 * CAPACITY_PER_S, 20.0, 4.0)
    world.offer(0.5 * CAPACITY_PER_S, 5.0, 4.0)
    refused_before, sent_before = world.num_refused, len(world.requests)
    world.offer(0.5 * CAPACITY_PER_S, 20.0, 4.0)
    assert world.num_refused == refused_before
    world.offer(0.0, 4.0, 4.0)
    assert all(request.error is None for request in world.requests[sent_before:])


def test_a_request_that_would_wait_too_long_is_refused_with_the_numbers(world: World) -> None:
    world.offer(5 * CAPACITY_PER_S, 20.0, 4.0)
    with pytest.raises(OverloadedError, match=r"wait about .* s behind .* others") as caught:
        world.submit_many(20, 4.0)
    assert 0.1 <= caught.value.retry_after_s < 4.0


def test_a_wait_that_is_too_long_for_any_request_is_known_before_its_prompt_is(
    world: World,
) -> None:
    world.offer(5 * CAPACITY_PER_S, 20.0, 4.0)
    dispatcher = world.cluster.dispatcher
    dispatcher.check_room(world.now + 60.0, world.now)
    with pytest.raises(OverloadedError, match=r"run for 0\.00 s or more"):
        dispatcher.check_room(world.now + 1.0, world.now)


def test_a_request_with_time_enough_is_taken_beside_those_that_are_refused(world: World) -> None:
    world.offer(5 * CAPACITY_PER_S, 20.0, 4.0)
    request = world.submit(60.0)
    world.offer(5 * CAPACITY_PER_S, 10.0, 4.0)
    assert request.is_done
    assert request.error is None


def test_nothing_is_refused_before_anything_is_measured() -> None:
    world = World()
    for _ in range(500):
        world.submit(0.01)
    world.join()
    assert not world.num_refused


def test_work_is_dropped_at_once_when_its_turn_comes_too_late(world: World) -> None:
    world.offer(CAPACITY_PER_S, 10.0, 4.0)
    running = [world.submit(4.0) for _ in range(NUM_SLOTS)]
    for _ in range(5):
        world.step()
    late = world.submit(SERVICE_S)  # taken, because the queue was never long and its pace unknown
    while not late.is_done:
        world.step()
    assert isinstance(late.error, DeadlineExceededError)
    assert "dropped before it cost the workers anything" in str(late.error)
    assert late.num_attempts == 0
    assert world.now < late.deadline_s
    assert all(request.error is None for request in running)


def test_work_that_ran_before_goes_on_whatever_its_deadline(world: World) -> None:
    world.offer(CAPACITY_PER_S, 10.0, 4.0)
    request = world.submit(SERVICE_S + STEP_S)
    for _ in range(4):
        world.step()
    world.cluster.kill("decode-0", world.now)
    world.join(1)
    world.step()
    assert request.num_attempts == 2
    assert request.error is None


def test_a_larger_pool_is_believed_at_once(world: World) -> None:
    world.offer(5 * CAPACITY_PER_S, 20.0, 4.0)
    for number in range(1, 5):
        world.join(number)
    world.offer(5 * CAPACITY_PER_S, 2.0, 4.0)
    refused_before = world.num_refused
    world.offer(4 * CAPACITY_PER_S, 20.0, 4.0)
    assert world.num_refused - refused_before <= 0.02 * 4 * CAPACITY_PER_S * 20


def test_a_pool_that_restarts_takes_requests_meanwhile(world: World) -> None:
    world.offer(5 * CAPACITY_PER_S, 20.0, 4.0)
    world.cluster.kill("decode-0", world.now)
    world.submit_many(20, 4.0)  # the pace of before says nothing of the workers to come
    world.offer(CAPACITY_PER_S, 6.0, 4.0)  # those before have expired
    request = world.submit(8.0)
    world.join(1)
    world.offer(0.0, 8.0, 4.0)
    assert request.is_done
    assert request.error is None


def test_work_that_a_worker_lost_says_nothing_of_how_long_prompts_take(world: World) -> None:
    world.offer(CAPACITY_PER_S, 10.0, 4.0)
    world.offer(0.0, 2.0, 4.0)
    times = world.cluster.dispatcher._deadlines._times
    before_s = times.first_token_s(3)
    for _ in range(NUM_SLOTS):
        world.submit(4.0)
    world.cluster.kill("decode-0", world.now)
    world.offer(0.0, 5.0, 4.0)
    assert not world.cluster.dispatcher.requests  # all have expired
    assert times.first_token_s(3) == before_s


def test_prompts_that_give_no_token_in_time_lengthen_the_estimate(world: World) -> None:
    world.offer(CAPACITY_PER_S, 10.0, 4.0)
    world.offer(0.0, 2.0, 4.0)
    dispatcher = world.cluster.dispatcher
    late = [world.submit(4.0) for _ in range(NUM_SLOTS)]
    world.now += 4.0  # the worker takes no step
    for request in late:
        dispatcher.expire(request, "its deadline", world.now)
    assert dispatcher._deadlines._times.first_token_s(3) > 1.0


def test_a_wrong_estimate_is_corrected_by_requests_that_get_through(world: World) -> None:
    times = world.cluster.dispatcher._deadlines._times
    for number in range(100):
        times.note_first_token(3, 1000.0, number * 0.01)
        times.note_inter_token(1000.0, number * 0.01)
        times.note_output(MAX_TOKENS, MAX_TOKENS, is_open=False, now=number * 0.01)
    world.now = 1.0
    world.submit(4.0)  # it gets through, because nothing else did for long
    with pytest.raises(OverloadedError):
        world.submit(4.0)
    world.offer(0.5 * CAPACITY_PER_S, 20 * PROBE_S, 4.0)
    refused_before = world.num_refused
    world.offer(0.5 * CAPACITY_PER_S, 20.0, 4.0)
    assert world.num_refused == refused_before


def test_requests_that_end_early_are_not_judged_by_max_tokens(world: World) -> None:
    deadlines = world.cluster.dispatcher._deadlines
    world.offer(CAPACITY_PER_S, 10.0, 4.0)
    for number in range(100):
        deadlines._times.note_output(10, 1000, is_open=False, now=world.now + number * 0.01)
    request = world.submit(4.0, max_tokens=1000)  # 100 s of tokens if none ended early
    world.step()
    assert request.num_attempts == 1
