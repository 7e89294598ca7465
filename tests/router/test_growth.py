"""No event of the dispatcher takes longer because there is more of anything, and none takes long.

Costs are counted in calls of functions, so that no clock is measured.
"""

import asyncio
from pathlib import Path

import pytest
from counted_calls import count_calls
from fake_worker import arithmetic_oracle
from router_deployment import until
from router_requests import make_active_request
from simulated_pair import SimulatedCluster
from tiny_tokenizer import write_tokenizer

from paceline.errors import CancelledError
from paceline.request import FailureReason
from paceline.router.active_request import ActiveRequest
from paceline.router.capacity import WorkerPool
from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.settings import RouterSettings
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView

MANY = 1000
MAX_AT_ONCE = 256
"""Choices that one event sends or puts back."""


def make_cluster(num_requests: int, *, num_workers: int = 1) -> SimulatedCluster:
    """Make decode workers with room for everything, one of which takes all requests."""
    cluster = SimulatedCluster(
        arithmetic_oracle(500), RouterSettings(max_queue_requests=num_requests + 1)
    )
    for number in range(num_workers):
        join(cluster, number, num_requests)
    return cluster


def join(cluster: SimulatedCluster, number: int, num_requests: int) -> None:
    cluster.join(
        f"decode-{number}",
        Role.DECODE,
        0.0,
        num_blocks=10 * num_requests + 10,
        max_num_seqs=num_requests + 1,
        local_prefill_tokens=1000,
    )


def submit(cluster: SimulatedCluster, num_requests: int) -> list[ActiveRequest]:
    requests = [make_active_request(str(number), max_tokens=2) for number in range(num_requests)]
    for request in requests:
        cluster.dispatcher.submit(request, 0.0)
    return requests


def test_requests_of_a_worker_that_dies_come_back_in_turns_and_none_is_lost() -> None:
    cluster = make_cluster(MANY)
    requests = submit(cluster, MANY)
    cluster.kill("decode-0", 0.0)
    assert 0 < cluster.dispatcher.num_waiting <= MAX_AT_ONCE
    assert cluster.catch_up(0.0) >= MANY // MAX_AT_ONCE - 1
    assert cluster.dispatcher.num_waiting == MANY
    join(cluster, 1, MANY)
    assert 0 < len(cluster.sent) - MANY <= MAX_AT_ONCE
    cluster.catch_up(0.0)
    assert len(cluster.sent) == 2 * MANY
    cluster.run(0.0, 3)
    assert all(request.is_done and request.error is None for request in requests)
    assert not cluster.dispatcher.running.attempts


@pytest.mark.parametrize("comes_back", [False, True])
def test_requests_that_wait_for_their_turn_after_a_death_may_end_meanwhile(
    comes_back: bool,
) -> None:
    cluster = make_cluster(MANY)
    requests = submit(cluster, MANY)
    cluster.kill("decode-0", 0.0)
    if comes_back:  # a worker of the same name must not lose what it is sent from now on
        join(cluster, 0, MANY)
    for request in requests[-300:]:
        cluster.dispatcher.fail(request, CancelledError("gone"), 0.0)
    join(cluster, 1, MANY)
    cluster.catch_up(0.0)
    cluster.run(0.0, 3)
    assert all(request.is_done for request in requests)
    assert [request.error is None for request in requests] == [True] * 700 + [False] * 300
    assert all(request.num_attempts == 2 for request in requests[:700])
    assert not cluster.dispatcher.running.streams


def test_work_that_a_worker_gives_back_in_one_message_comes_back_in_turns() -> None:
    cluster = make_cluster(MANY)
    submit(cluster, MANY)
    stream_ids = list(cluster.dispatcher.running.streams)
    dispatcher = cluster.dispatcher
    dispatcher.failure("decode-0", stream_ids, FailureReason.DRAINING, "it stops", 0.0)
    assert 0 < dispatcher.num_waiting <= MAX_AT_ONCE
    cluster.catch_up(1.0)
    assert dispatcher.num_waiting + len(dispatcher.running.attempts) == MANY


def test_long_prompts_are_sent_fewer_at_once() -> None:
    cluster = make_cluster(100, num_workers=0)
    for number in range(10):
        request = make_active_request(str(number), range(50_000), max_tokens=2)
        cluster.dispatcher.submit(request, 0.0)
    cluster.join(
        "decode-1", Role.DECODE, 0.0, num_blocks=10**6, max_num_seqs=100, local_prefill_tokens=10**6
    )
    assert 0 < len(cluster.sent) < 5
    cluster.catch_up(0.0)
    assert len(cluster.sent) == 10


def test_whoever_runs_the_dispatcher_is_told_when_there_is_more_to_do() -> None:
    cluster = make_cluster(MANY)
    submit(cluster, MANY)
    told: list[bool] = []
    dispatcher = cluster.dispatcher
    dispatcher._on_behind = lambda: told.append(dispatcher.is_behind)
    cluster.kill("decode-0", 0.0)
    num_turns = cluster.catch_up(0.0)
    assert told == [True] * num_turns


def cost_of_events(num_requests: int, num_workers: int) -> dict[str, int]:
    """Return the calls that each event takes while so many requests wait and as many run."""
    cluster = make_cluster(num_requests, num_workers=num_workers)
    running = submit(cluster, num_requests)
    dispatcher = cluster.dispatcher
    cluster.catch_up(0.0)
    full = WorkerLoad(0, 0, 10 * num_requests)
    for worker_id in cluster.workers:
        dispatcher.load_changed(worker_id, full, 0.0)
    waiting = [make_active_request(f"w{number}") for number in range(num_requests)]
    for request in waiting:
        dispatcher.submit(request, 0.0)
    newest = make_active_request("newest")
    gone = CancelledError("gone")
    return {
        "load": count_calls(lambda: dispatcher.load_changed("decode-0", full, 0.0)),
        "submit": count_calls(lambda: dispatcher.submit(newest, 0.0)),
        "cancel a waiting request": count_calls(lambda: dispatcher.fail(newest, gone, 0.0)),
        "cancel a running request": count_calls(lambda: dispatcher.fail(running[7], gone, 0.0)),
        "timer": count_calls(lambda: dispatcher.next_timer_s(0.0)),
        "death": count_calls(lambda: cluster.kill("decode-0", 0.0)),
        "turn after a death": count_calls(lambda: dispatcher.dispatch(0.0)),
    }


def test_events_cost_the_same_with_many_requests_and_many_workers() -> None:
    few = cost_of_events(600, 1)
    many = cost_of_events(3000, 1)
    for event, num_calls in many.items():
        assert num_calls <= 1.2 * few[event] + 20, event
    few = cost_of_events(20, 4)
    many = cost_of_events(20, 200)
    for event, num_calls in many.items():
        assert num_calls <= 1.2 * few[event] + 20, event


async def test_router_sends_the_rest_in_the_next_turns_of_its_event_loop(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    settings = RouterSettings(max_queue_requests=MANY)
    router = Router(settings, ServedModel("simulated", 1000, 256, (), tmp_path))
    dispatcher = router._dispatcher
    now = asyncio.get_running_loop().time()
    for number in range(MANY):
        dispatcher.submit(make_active_request(str(number)), now)
    pool = WorkerPool(10**6, 16, MANY, 1000)
    member = WorkerMember("decode-0", Role.DECODE, 1, "")
    dispatcher.worker_joined(WorkerView(member, pool, WorkerLoad(10**6, MANY)), now)
    assert 0 < len(dispatcher.running.attempts) <= MAX_AT_ONCE
    await until(lambda: not dispatcher.num_waiting, "all are sent")
    assert len(dispatcher.running.attempts) == MANY
    await router.stop()
