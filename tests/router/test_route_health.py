from itertools import pairwise

from paceline.router.route_health import RouteHealth

PAIR = ("p0", "d0")


def rests(health: RouteHealth, until_s: float) -> list[float]:
    """Fail work one piece after the other until then; return the waits between them."""
    waits, now = [], 0.0
    while now < until_s:
        health.wake(now)
        if not health.is_resting(*PAIR):
            health.failed(PAIR, now, now)
            waits.append(now)
        now += 0.0625
    return [later - earlier for earlier, later in pairwise(waits)]


def test_rests_double_up_to_the_longest_one() -> None:
    health = RouteHealth(first_rest_s=0.125, max_rest_s=3.0)
    assert rests(health, 13.0) == [0.125, 0.25, 0.5, 1.0, 2.0, 3.0, 3.0, 3.0]


def test_one_event_that_ends_many_pieces_of_work_counts_once() -> None:
    health = RouteHealth(first_rest_s=0.1)
    for _ in range(50):
        health.failed(PAIR, sent_s=1.0, now=2.0)
    assert health.num_failures(*PAIR) == 1
    health.wake(2.1)
    assert not health.is_resting(*PAIR)


def test_after_a_rest_one_piece_of_work_goes_first() -> None:
    health = RouteHealth(first_rest_s=0.1)
    health.failed(PAIR, 0.0, 0.0)
    health.wake(0.2)
    health.sent(*PAIR)
    assert health.is_resting(*PAIR)
    health.ended(*PAIR)  # cancelled: it has told nothing
    assert not health.is_resting(*PAIR)
    health.sent(*PAIR)
    health.worked(PAIR)
    assert not health.has_failures


def test_a_failing_worker_rests_in_every_pair_and_a_failing_pair_only_as_such() -> None:
    health = RouteHealth()
    health.failed(PAIR, 0.0, 0.0)
    assert not health.is_resting("p0", "d1")
    assert not health.is_resting(None, "d0")
    health.failed(("d0",), 0.0, 0.0)
    assert health.is_resting("p1", "d0")
    assert health.is_resting(None, "d0")


def test_one_refusal_has_no_rest_and_an_admission_ends_the_row() -> None:
    health = RouteHealth()
    health.failed(("d0",), 0.0, 0.0, is_refusal=True)
    assert not health.is_resting("p0", "d0")
    health.failed(("d0",), 0.0, 0.0, is_refusal=True)
    assert health.is_resting("p0", "d0")
    health.admitted("d0")
    assert not health.has_failures


def test_an_admission_says_nothing_about_a_worker_that_fails_what_it_takes() -> None:
    health = RouteHealth()
    health.failed(("d0",), 0.0, 0.0)
    health.admitted("d0")
    assert health.is_resting("p0", "d0")


def test_a_worker_that_has_gone_leaves_nothing_behind() -> None:
    health = RouteHealth()
    health.failed(PAIR, 0.0, 0.0)
    health.failed(("d0",), 0.0, 0.0)
    health.forget("d0")
    assert not health.has_failures
