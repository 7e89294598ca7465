"""Whatever fails, in whatever order messages come, clients get the tokens they would have got."""

from dataclasses import replace
from random import Random

import pytest
from fake_worker import BLOCK_TOKENS, arithmetic_oracle, expected_output
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from router_requests import make_active_request
from simulated_pair import SimulatedCluster

from paceline.errors import (
    CancelledError,
    InvalidRequestError,
    QueueFullError,
    RequestFailedError,
)
from paceline.request import FailureReason, FinishReason
from paceline.router.active_request import ActiveRequest
from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL
from paceline.router.settings import RouterSettings
from paceline.router.worker_messages import TokenColumns
from paceline.router.worker_view import Role

ORACLE = arithmetic_oracle(500)
PATIENT = RouterSettings(
    max_lone_deaths=1000, max_internal_failures=1000, max_setbacks=1000, max_refusals=1000
)


def make_cluster(settings: RouterSettings | None = None) -> SimulatedCluster:
    cluster = SimulatedCluster(ORACLE, settings)
    cluster.join("prefill-0", Role.PREFILL, 0.0)
    cluster.join("decode-0", Role.DECODE, 0.0)
    return cluster


def assert_complete(request: ActiveRequest) -> None:
    journal = request.journal
    assert request.error is None
    assert request.is_done
    for choice in journal.choices:
        assert choice.output == expected_output(
            ORACLE, journal.prompt.tolist(), journal.sampling.max_tokens or 0, choice.choice
        )


def assert_nothing_left(cluster: SimulatedCluster) -> None:
    dispatcher = cluster.dispatcher
    assert dispatcher.num_waiting == 0
    assert not dispatcher.requests
    assert not dispatcher.running.streams
    assert not dispatcher.running.attempts
    assert dispatcher._suspects.running is None
    for view in dispatcher.placement.workers.values():
        assert not view.without_token
        assert not view.is_reserved
    for worker in cluster.workers.values():
        assert not worker.held, f"{worker.worker_id} still holds {list(worker.held)}"


def test_request_goes_to_both_workers_at_once_and_ends_complete() -> None:
    cluster = make_cluster()
    request = make_active_request(n=2)
    cluster.dispatcher.submit(request, 0.0)
    assert [worker_id for worker_id, _ in cluster.sent] == ["decode-0", "prefill-0"]
    cluster.run(0.0, 12)
    assert_complete(request)
    assert request.num_resumed == 0
    assert_nothing_left(cluster)


def test_first_token_that_is_the_last_one_frees_the_decode_worker() -> None:
    cluster = make_cluster()
    request = make_active_request(max_tokens=1)
    cluster.dispatcher.submit(request, 0.0)
    cluster.workers["prefill-0"].inbox.popleft()()
    cluster.workers["prefill-0"].step()
    while cluster.workers["prefill-0"].outbox:
        cluster.workers["prefill-0"].outbox.popleft()(0.0)
    assert_complete(request)
    cluster.run(0.0, 2)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_prefill_worker_frees_a_request_that_ended_there_and_that_decode_refused(
    num_choices: int,
) -> None:
    """The decode worker has nothing to give back, so only the router can say that it is over."""
    cluster = make_cluster()
    prefill, decode = cluster.workers["prefill-0"], cluster.workers["decode-0"]
    decode.refuses = True
    request = make_active_request(n=num_choices, max_tokens=1)
    cluster.dispatcher.submit(request, 0.0)
    prefill.inbox.popleft()()
    prefill.step()
    while prefill.outbox:
        prefill.outbox.popleft()(0.0)
    assert_complete(request)
    assert prefill.held
    cluster.run(0.0, 2)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_death_before_decode_puts_the_request_back_and_cancels_it_at_the_survivor(
    victim: str,
) -> None:
    cluster = make_cluster()
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    survivor = "decode-0" if victim == "prefill-0" else "prefill-0"
    cluster.kill(victim, 1.0)
    assert [(worker_id, key.attempt) for worker_id, key, _ in cluster.cancels] == [(survivor, 1)]
    assert len(cluster.dispatcher.queue) == 1
    cluster.join(victim, Role(victim.split("-", maxsplit=1)[0]), 2.0)
    cluster.run(2.0, 12)
    assert_complete(request)
    assert request.num_resumed == 1
    assert_nothing_left(cluster)


def test_death_of_the_prefill_worker_after_decode_has_begun_disturbs_nobody() -> None:
    cluster = make_cluster()
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    cluster.run(0.0, 3)
    cluster.kill("prefill-0", 3.0)
    cluster.run(3.0, 12)
    assert_complete(request)
    assert request.num_resumed == 0


def test_choices_with_output_resume_each_alone_with_names_of_their_own() -> None:
    cluster = make_cluster()
    request = make_active_request(n=2)
    cluster.dispatcher.submit(request, 0.0)
    cluster.run(0.0, 3)
    cluster.sent.clear()
    cluster.kill("decode-0", 3.0)
    cluster.join("decode-0", Role.DECODE, 4.0)
    works = [work for worker_id, work in cluster.sent if worker_id == "decode-0"]
    assert [work.choices for work in works] == [(0,), (1,)]
    assert [work.key.request_id for work in works] == ["a@router/0", "a@router/1"]
    assert all(len(work.output) > 0 for work in works)
    assert len({work.key for work in works}) == 2
    cluster.run(4.0, 12)
    assert_complete(request)
    assert_nothing_left(cluster)


def test_request_under_which_workers_die_also_when_it_is_alone_fails_with_the_setting_named() -> (
    None
):
    cluster = make_cluster()
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    for number in range(5):
        assert request.error is None
        cluster.kill(f"decode-{number}", 1.0)
        cluster.join(f"decode-{number + 1}", Role.DECODE, 2.0)
    assert isinstance(request.error, RequestFailedError)
    assert "2 workers died in a row" in str(request.error)
    assert "3 more when it ran alone (decode-0, decode-1, decode-2, " in str(request.error)
    assert "router.max_worker_deaths is 2 and router.max_lone_deaths 3" in str(request.error)
    cluster.run(3.0, 2)
    assert_nothing_left(cluster)


def test_deaths_with_new_tokens_between_them_are_not_added_up() -> None:
    cluster = make_cluster()
    request = make_active_request(max_tokens=40)
    cluster.dispatcher.submit(request, 0.0)
    now = 0.0
    for number in range(8):
        now = cluster.run(now, 3)
        cluster.kill(f"decode-{number}", now)
        cluster.join(f"decode-{number + 1}", Role.DECODE, now)
    cluster.run(now, 40)
    assert_complete(request)
    assert request.num_resumed == 8


@pytest.mark.parametrize("how", ["drained", "left the membership"])
def test_planned_stops_are_never_counted(how: str) -> None:
    cluster = make_cluster()
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    for number in range(20):
        worker_id = f"decode-{number}"
        cluster.join(f"decode-{number + 1}", Role.DECODE, 1.0)
        if how == "drained":
            load = replace(cluster.workers[worker_id].load(), draining=True)
            cluster.dispatcher.load_changed(worker_id, load, 1.0)
        del cluster.workers[worker_id]
        cluster.dispatcher.worker_lost(worker_id, 2.0, is_planned=how != "drained")
    cluster.run(2.0, 12)
    assert_complete(request)


def test_a_poisonous_request_kills_few_workers_and_takes_nobody_with_it() -> None:
    """Everybody dies with it twice, and so is a suspect; only it dies alone, too."""
    cluster = make_square()
    bystanders = [make_active_request(str(n), [n], max_tokens=30) for n in range(10)]
    poison = make_active_request("poison", max_tokens=30)
    requests = [*bystanders[:5], poison, *bystanders[5:]]
    for request in requests:
        cluster.dispatcher.submit(request, 0.0)
    now, num_kills = 0.0, 0
    while any(not request.is_done for request in requests):
        cluster.deliver_all(now)
        for worker_id in cluster.kill_poisoned(now):
            num_kills += 1
            cluster.join(worker_id, Role.DECODE, now)
        for worker in cluster.workers.values():
            worker.step()
        cluster.deliver_all(now)
        now = cluster.pass_time(now, 0.1)
        assert now < 60.0, "requests hang"
    assert isinstance(poison.error, RequestFailedError)
    assert num_kills == 5
    for request in bystanders:
        assert_complete(request)
    assert_nothing_left(cluster)


def test_a_suspect_runs_where_nothing_else_is_without_a_token() -> None:
    cluster = make_cluster()
    suspect = make_active_request("suspect")
    cluster.dispatcher.submit(suspect, 0.0)
    for _ in range(2):
        cluster.kill("decode-0", 1.0)
        cluster.join("decode-0", Role.DECODE, 1.0)
    cluster.sent.clear()
    other = make_active_request("other")
    cluster.dispatcher.submit(other, 1.0)
    assert not cluster.sent  # the suspect's attempt is out, and nothing may join it
    assert cluster.dispatcher.num_waiting == 1
    now = cluster.run(1.0, 3)
    assert {work.key.request_id for _, work in cluster.sent} == {other.wire_id}
    cluster.run(now, 20)
    assert_complete(suspect)
    assert_complete(other)
    assert_nothing_left(cluster)


def test_a_cancelled_suspect_leaves_no_reservation() -> None:
    cluster = make_cluster()
    requests = [make_active_request(name) for name in ("a", "b")]
    for request in requests:
        cluster.dispatcher.submit(request, 0.0)
    for _ in range(2):
        cluster.kill("decode-0", 1.0)
        cluster.join("decode-0", Role.DECODE, 1.0)
    for request in requests:  # one runs alone, the other waits
        cluster.dispatcher.fail(request, CancelledError("gone"), 2.0)
    third = make_active_request("c")
    cluster.dispatcher.submit(third, 3.0)
    cluster.run(3.0, 20)
    assert_complete(third)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("seed", range(6))
def test_kills_in_quick_succession_fail_no_request(seed: int) -> None:
    """A worker dies every two seconds and comes back a little later; a first token takes 0.4 s."""
    random = Random(seed)
    cluster = make_square()
    requests = []
    absent: dict[str, float] = {}
    now = 0.0
    for number in range(1200):
        if number % 10 == 0 and number < 600:
            prompt = [random.randrange(100) for _ in range(random.randrange(1, 40))]
            request = make_active_request(str(number), prompt, max_tokens=30, arrived_s=now)
            requests.append(request)
            cluster.dispatcher.submit(request, now)
        if number < 700 and random.random() < 0.05 and cluster.workers:
            victim = random.choice(sorted(cluster.workers))
            cluster.kill(victim, now)
            absent[victim] = now + random.uniform(0.1, 1.0)
        for worker_id in [w for w, back_s in absent.items() if back_s <= now]:
            del absent[worker_id]
            cluster.join(worker_id, Role(worker_id.split("-", maxsplit=1)[0]), now)
        cluster.deliver_all(now)
        for worker in cluster.workers.values():
            worker.step()
        now = cluster.pass_time(now, 0.1)
    cluster.run(now, 60)
    for request in requests:
        assert_complete(request)
    assert_nothing_left(cluster)


def test_internal_failures_in_a_row_are_retried_up_to_the_setting() -> None:
    cluster = make_cluster(RouterSettings(max_internal_failures=2))
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    now = 0.0
    for _ in range(2):
        assert request.error is None
        cluster.deliver_all(now)
        cluster.workers["decode-0"].fail(0, FailureReason.INTERNAL)
        now = cluster.run(now, 1)
    assert isinstance(request.error, RequestFailedError)
    assert "router.max_internal_failures is 2" in str(request.error)
    assert "decode-0 gave it back (INTERNAL): scripted" in str(request.error)
    cluster.run(now, 2)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("reason", [FailureReason.INTERNAL, FailureReason.LEASE_LOST])
def test_failures_with_new_tokens_between_them_are_not_added_up(reason: FailureReason) -> None:
    cluster = make_cluster(RouterSettings(max_internal_failures=2, max_setbacks=2))
    request = make_active_request(max_tokens=40)
    cluster.dispatcher.submit(request, 0.0)
    now = 0.0
    for _ in range(6):
        now = cluster.run(now, 3)
        cluster.workers["decode-0"].fail(0, reason)
    cluster.run(now, 40)
    assert_complete(request)
    assert request.num_attempts == 7


def test_choices_that_one_attempt_gives_back_one_by_one_count_once_each() -> None:
    cluster = make_cluster(RouterSettings(max_internal_failures=2))
    request = make_active_request(n=3)
    cluster.dispatcher.submit(request, 0.0)
    cluster.deliver_all(0.0)
    for _ in range(3):
        cluster.workers["decode-0"].fail(0, FailureReason.INTERNAL)
    cluster.run(0.0, 20)
    assert_complete(request)
    assert_nothing_left(cluster)


def test_the_token_of_the_prefill_worker_ends_no_row_of_failures() -> None:
    """Each attempt has one, so a decode worker that fails at its first step would never count."""
    cluster = make_cluster(RouterSettings(max_internal_failures=3))
    request = make_active_request(max_tokens=40)
    cluster.dispatcher.submit(request, 0.0)
    now = 0.0
    while not request.is_done:
        cluster.deliver_all(now)
        cluster.workers["prefill-0"].step()
        cluster.deliver_all(now)
        cluster.workers["decode-0"].fail(0, FailureReason.INTERNAL)
        now = cluster.pass_time(now, 1.0)
    assert len(request.journal.choices[0].output) == 3
    assert "router.max_internal_failures is 3" in str(request.error)


def make_square(settings: RouterSettings | None = None) -> SimulatedCluster:
    """Two prefill and two decode workers."""
    cluster = make_cluster(settings)
    cluster.join("prefill-1", Role.PREFILL, 0.0)
    cluster.join("decode-1", Role.DECODE, 0.0)
    return cluster


def submit_many(cluster: SimulatedCluster, num_requests: int) -> list[ActiveRequest]:
    """Send requests one after the other, and let each end: two in a second."""
    requests = []
    now = 100.0 * len(cluster.sent)
    for number in range(num_requests):
        requests.append(make_active_request(str(number), max_tokens=3, arrived_s=now))
        cluster.dispatcher.submit(requests[-1], now)
        for _ in range(10):
            cluster.deliver_all(now)
            for worker in cluster.workers.values():
                worker.step()
            cluster.deliver_all(now)
            now = cluster.pass_time(now, 0.05)
    cluster.run(now, 20)
    return requests


def test_a_pair_that_cannot_connect_gets_little_work_and_harms_no_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = make_square()
    cluster.broken_pairs.add(("prefill-0", "decode-0"))
    for request in submit_many(cluster, 100):  # 50 s
        assert_complete(request)
        assert request.num_attempts <= 3
    assert cluster.num_broken_attempts <= 12
    assert "route_rests workers=prefill-0,decode-0 rest_s=0.2 reason=LEASE_LOST" in caplog.text
    assert_nothing_left(cluster)


PAIRS = [(f"prefill-{i}", f"decode-{j}") for i in (0, 1) for j in (0, 1)]


@settings(max_examples=15, deadline=None)
@given(st.sets(st.sampled_from(PAIRS), min_size=1, max_size=3))
def test_requests_end_well_as_long_as_one_pair_works(broken: set[tuple[str, str]]) -> None:
    cluster = make_square()
    cluster.broken_pairs |= broken
    for request in submit_many(cluster, 40):  # 20 s
        assert_complete(request)
    assert cluster.num_broken_attempts <= 10 * len(broken)
    assert_nothing_left(cluster)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("reason", [FailureReason.REFUSED, FailureReason.INTERNAL])
def test_a_worker_that_gives_all_its_work_back_gets_little(
    victim: str, reason: FailureReason
) -> None:
    cluster = make_square()
    cluster.workers[victim].gives_back = reason
    for request in submit_many(cluster, 100):
        assert_complete(request)
    assert cluster.num_broken_attempts <= 12
    assert_nothing_left(cluster)


def test_a_repaired_pair_is_used_again() -> None:
    cluster = make_square()
    cluster.broken_pairs.add(("prefill-0", "decode-0"))
    submit_many(cluster, 20)
    cluster.broken_pairs.clear()
    submit_many(cluster, 100)
    assert not cluster.dispatcher.placement.routes.has_failures


def test_request_that_no_pair_can_serve_fails_soon_and_says_why() -> None:
    cluster = make_square()
    cluster.broken_pairs.update((f"prefill-{i}", f"decode-{j}") for i in (0, 1) for j in (0, 1))
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    now = 0.0
    while not request.is_done:
        cluster.deliver_all(now)
        for worker in cluster.workers.values():
            worker.step()
        now = cluster.pass_time(now, 0.01)
        assert now < 2.0
    assert isinstance(request.error, RequestFailedError)
    assert "8 attempts in a row failed without a new token" in str(request.error)
    assert "router.max_setbacks is 8" in str(request.error)
    assert "(LEASE_LOST): cannot connect" in str(request.error)
    cluster.run(now, 1)
    assert_nothing_left(cluster)


def test_decode_worker_that_may_computes_the_prompt_when_no_kv_moves() -> None:
    cluster = SimulatedCluster(ORACLE)
    cluster.join("prefill-0", Role.PREFILL, 0.0)
    cluster.join("decode-0", Role.DECODE, 0.0, local_prefill_tokens=UNLIMITED_LOCAL_PREFILL)
    cluster.broken_pairs.add(("prefill-0", "decode-0"))
    for request in submit_many(cluster, 5):
        assert_complete(request)


def test_request_that_is_refused_without_end_fails_and_says_why() -> None:
    cluster = make_cluster(RouterSettings(max_refusals=5))
    cluster.workers["decode-0"].refuses = True
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    cluster.run(0.0, 6)
    assert "no room for it 5 times in a row" in str(request.error)
    assert "router.max_refusals is 5" in str(request.error)
    assert "decode-0 gave it back (REFUSED): scripted" in str(request.error)


def test_expired_request_names_the_last_setback() -> None:
    cluster = make_cluster()
    cluster.broken_pairs.add(("prefill-0", "decode-0"))
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    now = cluster.run(0.0, 2)
    cluster.dispatcher.expire(request, "timeout_s, 2 s", now)
    assert "gave it back (LEASE_LOST): cannot connect; the limit was" in str(request.error)


def test_refusal_waits_longer_each_time_and_is_no_resumption() -> None:
    cluster = make_cluster()
    worker = cluster.workers["decode-0"]
    worker.refuses = True
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    now, waits = 0.0, []
    for _ in range(5):
        cluster.deliver_all(now)
        ready = cluster.dispatcher.next_timer_s(now)
        assert ready is not None
        waits.append(round(ready - now, 6))
        cluster.dispatcher.dispatch(now)
        assert len(cluster.dispatcher.queue) == 1
        now = ready
        cluster.dispatcher.dispatch(now)
        assert len(cluster.dispatcher.queue) == 0
    assert waits == [0.005, 0.01, 0.02, 0.04, 0.08]
    worker.refuses = False
    cluster.run(now + 1, 12)
    assert_complete(request)
    assert request.num_resumed == 0
    assert_nothing_left(cluster)


def test_cancel_frees_both_workers_and_the_queue() -> None:
    cluster = make_cluster()
    running, waiting = make_active_request("a"), make_active_request("b", range(1000))
    cluster.dispatcher.submit(running, 0.0)
    cluster.dispatcher.submit(waiting, 0.0)
    assert len(cluster.dispatcher.queue) == 1
    for request in (running, waiting):
        cluster.dispatcher.fail(request, CancelledError("gone"), 1.0)
    assert {worker_id for worker_id, _, _ in cluster.cancels} == {"prefill-0", "decode-0"}
    cluster.run(1.0, 1)
    assert_nothing_left(cluster)


def test_expired_request_says_how_far_it_came() -> None:
    cluster = make_cluster()
    request = make_active_request(max_tokens=100)
    cluster.dispatcher.submit(request, 0.0)
    cluster.run(0.0, 4)
    cluster.dispatcher.expire(request, "timeout_s, 4 s", 4.0)
    assert "tokens were generated" in str(request.error)
    assert "the limit was timeout_s, 4 s" in str(request.error)
    cluster.run(4.0, 2)
    assert_nothing_left(cluster)


def test_without_workers_requests_wait_and_are_served_when_one_joins() -> None:
    cluster = SimulatedCluster(ORACLE, RouterSettings(max_queue_requests=1))
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    with pytest.raises(QueueFullError):
        cluster.dispatcher.submit(make_active_request("b"), 0.0)
    cluster.join("decode-0", Role.DECODE, 1.0, local_prefill_tokens=100)
    cluster.run(1.0, 12)
    assert_complete(request)
    assert_nothing_left(cluster)


def test_many_queued_requests_that_are_too_large_fail_when_the_pool_is_known() -> None:
    cluster = SimulatedCluster(ORACLE, RouterSettings(max_queue_requests=3000))
    requests = [make_active_request(str(i), range(40)) for i in range(2000)]
    for request in requests:
        cluster.dispatcher.submit(request, 0.0)
    cluster.join("decode-0", Role.DECODE, 1.0, num_blocks=2)
    cluster.catch_up(1.0)
    assert all(isinstance(request.error, InvalidRequestError) for request in requests)
    assert_nothing_left(cluster)


def test_default_max_tokens_is_lowered_to_what_the_pool_holds_and_an_explicit_one_is_refused() -> (
    None
):
    cluster = SimulatedCluster(ORACLE)
    cluster.join("decode-0", Role.DECODE, 0.0, num_blocks=3, local_prefill_tokens=100)
    open_ended = make_active_request(max_tokens=500)
    open_ended.max_tokens_is_default = True
    cluster.dispatcher.submit(open_ended, 0.0)
    assert open_ended.journal.sampling.max_tokens == 2 * 16 - 3 + 1  # the last token needs no KV
    with pytest.raises(InvalidRequestError, match="largest decode worker has 3"):
        cluster.dispatcher.submit(make_active_request("b", max_tokens=500), 0.0)


def test_default_max_tokens_is_lowered_to_what_a_prefill_worker_could_resume() -> None:
    cluster = SimulatedCluster(ORACLE)
    cluster.join("prefill-0", Role.PREFILL, 0.0, num_blocks=2)
    cluster.join("decode-0", Role.DECODE, 0.0, num_blocks=64)
    open_ended = make_active_request(max_tokens=500)
    open_ended.max_tokens_is_default = True
    cluster.dispatcher.submit(open_ended, 0.0)
    assert open_ended.journal.sampling.max_tokens == 2 * 16 - 3 + 1
    now = cluster.run(0.0, 20)
    for _ in range(2):  # also with its last token but one
        assert not open_ended.is_done
        cluster.workers["decode-0"].fail(0, FailureReason.PREEMPTED)
        now = cluster.run(now, 9)
    cluster.run(now, 5)
    assert_complete(open_ended)


def test_request_that_no_prefill_worker_could_resume_is_refused_with_the_setting() -> None:
    cluster = SimulatedCluster(ORACLE)
    cluster.join("prefill-0", Role.PREFILL, 0.0, num_blocks=2)
    cluster.join("decode-0", Role.DECODE, 0.0, num_blocks=64)
    fits = make_active_request("fits", range(BLOCK_TOKENS), max_tokens=BLOCK_TOKENS + 1)
    cluster.dispatcher.submit(fits, 0.0)
    long = make_active_request("long", range(BLOCK_TOKENS), max_tokens=BLOCK_TOKENS + 2)
    with pytest.raises(InvalidRequestError) as caught:
        cluster.dispatcher.submit(long, 0.0)
    [violation] = caught.value.violations
    assert violation.field == "sampling.max_tokens"
    assert "for 16 prompt tokens and max_tokens 18, 33 tokens" in violation.description
    assert "need 3 KV blocks" in violation.description
    assert "largest prefill worker has 2" in violation.description
    assert "raise prefill.num_kv_blocks" in violation.description


def test_request_with_more_choices_than_any_worker_runs_is_refused_with_the_setting() -> None:
    cluster = SimulatedCluster(ORACLE)
    cluster.join("prefill-0", Role.PREFILL, 0.0, max_num_seqs=30)
    cluster.join("decode-0", Role.DECODE, 0.0, num_blocks=1000)
    with pytest.raises(
        InvalidRequestError, match=r"runs at most 8.*decode\.max_num_seqs"
    ) as caught:
        cluster.dispatcher.submit(make_active_request("wide", n=9), 0.0)
    assert caught.value.violations[0].field == "sampling.n"
    widest = make_active_request("widest", n=8)
    cluster.dispatcher.submit(widest, 0.0)
    cluster.run(0.0, 12)
    assert_complete(widest)


def grow_then_shrink_prefill(local_prefill_tokens: int) -> tuple[SimulatedCluster, ActiveRequest]:
    """Let a request outgrow the prefill worker that comes after the one it began with."""
    cluster = SimulatedCluster(ORACLE)
    cluster.join("prefill-0", Role.PREFILL, 0.0, num_blocks=8)
    cluster.join("decode-0", Role.DECODE, 0.0, local_prefill_tokens=local_prefill_tokens)
    long = make_active_request("long", range(BLOCK_TOKENS), max_tokens=4 * BLOCK_TOKENS)
    cluster.dispatcher.submit(long, 0.0)
    now = cluster.run(0.0, 2 * BLOCK_TOKENS)
    cluster.kill("prefill-0", now)
    cluster.join("prefill-0", Role.PREFILL, now, num_blocks=2)
    assert not long.is_done
    cluster.workers["decode-0"].fail(0, FailureReason.PREEMPTED)
    now = cluster.run(now + 1.0, 3)
    short = make_active_request("short", max_tokens=2)
    cluster.dispatcher.submit(short, now)
    cluster.run(now, 100)
    assert_complete(short)
    assert_nothing_left(cluster)
    return cluster, long


def test_choice_that_has_outgrown_every_prefill_worker_fails_and_blocks_nobody() -> None:
    _, long = grow_then_shrink_prefill(local_prefill_tokens=0)
    assert isinstance(long.error, RequestFailedError)
    assert "after 1 attempt(s)" in str(long.error)
    assert "largest prefill worker has 2" in str(long.error)
    assert "prefill.num_kv_blocks" in str(long.error)


def test_choice_that_has_outgrown_every_prefill_worker_goes_on_at_a_decode_worker_that_may() -> (
    None
):
    cluster, long = grow_then_shrink_prefill(local_prefill_tokens=UNLIMITED_LOCAL_PREFILL)
    assert_complete(long)
    resumed = [worker_id for worker_id, work in cluster.sent if work.key.attempt == 2]
    assert resumed == ["decode-0"]


def test_choice_whose_last_token_fills_a_gap_ends_its_request() -> None:
    cluster = make_cluster()
    request = make_active_request(max_tokens=2)
    cluster.dispatcher.submit(request, 0.0)
    worker = cluster.workers["decode-0"]
    worker.inbox.popleft()()
    while worker.outbox:
        worker.outbox.popleft()(0.0)
    [stream] = cluster.sent[0][1].stream_ids
    # The decode worker's report of index 1, its end included, overtakes the one of index 0.
    last = TokenColumns([stream], [1], [8], [(stream, FinishReason.LENGTH)])
    cluster.dispatcher.tokens("decode-0", last, 1.0)
    assert not request.is_done
    cluster.dispatcher.tokens("prefill-0", TokenColumns([stream], [0], [7]), 1.0)
    assert request.journal.choices[0].output == [7, 8]
    assert request.is_done
    assert request.error is None
    assert not cluster.dispatcher.running.attempts


def test_stop_string_cancels_its_choice_at_the_workers() -> None:
    cluster = make_cluster()
    request = make_active_request(n=2)
    stop = expected_output(ORACLE, [1, 2, 3], 3, choice=1)[2]
    request.journal.choices[1]._text._stop_token = stop  # type: ignore[attr-defined]
    cluster.dispatcher.submit(request, 0.0)
    cluster.run(0.0, 12)
    assert len(request.journal.choices[1].output) == 3
    assert ("decode-0", request.wire_id, (1,)) in [
        (worker_id, key.request_id, choices) for worker_id, key, choices in cluster.cancels
    ]
    assert request.is_done
    assert_nothing_left(cluster)


@st.composite
def events(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kinds = ["take", "take", "take", "send", "send", "send", "step", "step", "step"]
    kinds += ["kill", "join", "fail", "refuse", "submit", "cancel", "tick", "break", "stop"]
    return draw(
        st.lists(
            st.tuples(st.sampled_from(kinds), st.integers(0, 7), st.integers(0, 7)),
            max_size=120,
        )
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events(), st.integers(0, 40))
def test_streams_are_what_they_would_have_been_whatever_happens(
    script: list[tuple[str, int, int]], local_prefill_tokens: int
) -> None:
    cluster = SimulatedCluster(ORACLE, PATIENT)
    names = ["prefill-0", "decode-0", "prefill-1", "decode-1"]
    requests: list[ActiveRequest] = []
    cancelled: set[ActiveRequest] = set()
    now = 0.0

    def join(worker_id: str) -> None:
        role = Role(worker_id.split("-", maxsplit=1)[0])
        local = local_prefill_tokens if role is Role.DECODE else 0
        cluster.join(worker_id, role, now, num_blocks=24, local_prefill_tokens=local)

    def submit(pick: int, count: int) -> None:
        prompt = [number + pick for number in range(1, 2 + 9 * pick)]
        name = str(len(requests))
        request = make_active_request(
            name, prompt, n=1 + count % 3, max_tokens=1 + count, arrived_s=now
        )
        requests.append(request)
        cluster.dispatcher.submit(request, now)

    for name in names[:2]:
        join(name)
    submit(1, 5)
    for kind, pick, count in script:
        now += 0.001
        name = names[pick % len(names)]
        worker = cluster.workers.get(name)
        if kind == "submit":
            submit(pick, count)
        elif kind == "cancel":
            request = requests[pick % len(requests)]
            if not request.is_done:
                cancelled.add(request)
            cluster.dispatcher.fail(request, CancelledError("gone"), now)
        elif kind == "join" and worker is None:
            join(name)
        elif kind == "tick":
            now += 1.0
            cluster.dispatcher.dispatch(now)
        elif kind == "break":
            pair = f"prefill-{pick % 2}", f"decode-{count % 2}"
            cluster.broken_pairs ^= {pair}
        elif worker is None:
            continue
        elif kind == "kill":
            cluster.kill(name, now)
        elif kind == "stop":
            load = replace(worker.load(), draining=True)
            cluster.dispatcher.load_changed(name, load, now)
            if count % 2:
                cluster.kill(name, now)
        elif kind == "take" and worker.inbox:
            worker.inbox.popleft()()
        elif kind == "send" and worker.outbox:
            worker.outbox.popleft()(now)
        elif kind == "step":
            worker.step()
        elif kind == "fail":
            worker.fail(count, list(FailureReason)[count % len(FailureReason)])
        elif kind == "refuse":
            worker.refuses = not worker.refuses
        for request in requests:
            for choice in request.journal.choices:
                wanted = expected_output(
                    ORACLE,
                    request.journal.prompt.tolist(),
                    len(choice.output),
                    choice.choice,
                )
                assert choice.output == wanted
    for name in names:
        if name not in cluster.workers:
            join(name)
        cluster.workers[name].refuses = False
    cluster.broken_pairs.clear()
    now = cluster.run(now + 1, 150)
    cluster.run(now, 2)
    for request in requests:
        if request in cancelled:
            assert isinstance(request.error, CancelledError)
        else:
            assert_complete(request)
    assert_nothing_left(cluster)
