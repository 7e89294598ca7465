"""Estimates learn what samples say, err on the low side, and forget what no longer holds."""

import pytest

from paceline.router.estimates import QueuePace, RunningFit, RunningMean, ServiceTimes


def busy_pace(num: int, interval_s: float, *, num_tokens: int = 100) -> QueuePace:
    """A queue that always has work, which one request leaves in each interval."""
    pace = QueuePace()
    pace.waits(0.0)
    for number in range(1, num + 1):
        pace.left(num_tokens, number * interval_s)
    return pace


def test_a_mean_follows_many_samples_slowly() -> None:
    mean = RunningMean()
    for number in range(100):
        mean.add(1.0, number * 0.01)
    mean.add(2.0, 1.0)
    assert mean.value == pytest.approx(1.0, abs=0.05)


def test_one_sample_after_a_long_silence_outweighs_all_earlier_ones() -> None:
    mean = RunningMean()
    for number in range(100):
        mean.add(10.0, number * 0.01)
    mean.add(1.0, 11.0)
    assert mean.value == pytest.approx(1.0, abs=0.1)


def test_a_fit_finds_a_fixed_part_and_a_part_for_each_token() -> None:
    fit = RunningFit()
    for number in range(200):
        tokens = number * 37 % 1000
        fit.add(tokens, 0.02 + tokens / 5000, number * 0.05)
    assert fit.at(0) == pytest.approx(0.02, abs=0.01)
    assert fit.at(2000) == pytest.approx(0.42, rel=0.1)


def test_a_fit_of_samples_that_do_not_differ_expects_the_same_everywhere() -> None:
    fit = RunningFit()
    for number in range(50):
        fit.add(100, 0.5 + 0.1 * (number % 2), number * 0.05)
    assert fit.at(100_000) == pytest.approx(0.55, abs=0.1)


def test_a_fit_never_falls_with_more_tokens() -> None:
    fit = RunningFit()
    fit.add(0, 1.0, 0.0)
    fit.add(1000, 0.5, 0.05)
    low, high = fit.at(0), fit.at(10**6)
    assert low is not None
    assert high is not None
    assert 0.0 < low <= high


def test_a_queue_with_work_all_the_time_shows_the_workers_pace() -> None:
    pace = busy_pace(100, 0.05)
    assert pace.wait_s(20, 2000) == pytest.approx(1.0)


def test_the_time_in_which_the_queue_is_empty_does_not_count() -> None:
    pace = busy_pace(20, 0.05)
    pace.is_empty()
    pace.left(100, 1000.0)  # it came and went at once
    pace.waits(1000.0)
    for number in range(1, 20):
        pace.left(100, 1000.0 + number * 0.05)
    assert pace.wait_s(20, 2000) == pytest.approx(1.0, rel=0.05)


def test_work_that_leaves_together_counts_for_the_time_that_it_waited() -> None:
    pace = QueuePace()
    pace.waits(0.0)
    for number in range(1, 41):
        pace.left(100, (number + 3) // 4 * 0.2)  # four at once
    assert pace.wait_s(20, 2000) == pytest.approx(1.0, rel=0.1)


def test_the_wait_is_the_sooner_one_of_that_by_requests_and_that_by_tokens() -> None:
    pace = busy_pace(100, 0.05, num_tokens=1000)
    assert pace.wait_s(20, 100) == pytest.approx(0.005)
    assert pace.wait_s(2, 10**6) == pytest.approx(0.1)


def test_nothing_is_said_of_the_wait_before_enough_work_has_left() -> None:
    assert QueuePace().wait_s(1000, 10**6) is None
    assert busy_pace(5, 1.0).wait_s(1000, 10**6) is None


def test_a_pace_that_is_forgotten_is_measured_anew() -> None:
    pace = busy_pace(100, 1.0)
    pace.forget()
    assert pace.wait_s(20, 2000) is None
    for number in range(1, 21):
        pace.left(100, 100.0 + number * 0.05)
    assert pace.wait_s(20, 2000) == pytest.approx(1.0, rel=0.1)


def test_service_that_was_never_measured_takes_no_time() -> None:
    times = ServiceTimes()
    assert times.first_token_s(10**6) == 0.0
    assert times.decode_s(10**6, is_open=False) == 0.0


def test_early_ends_shorten_the_expected_output() -> None:
    times = ServiceTimes()
    for number in range(50):
        times.note_inter_token(0.02, number * 0.1)
        times.note_output(25, 100, is_open=False, now=number * 0.1)
    assert times.decode_s(100, is_open=False) == pytest.approx(24 * 0.02)


def test_requests_that_ask_for_much_do_not_lengthen_those_that_ask_for_little() -> None:
    times = ServiceTimes()
    for number in range(50):
        now = number * 0.1
        times.note_inter_token(0.02, now)
        times.note_output(8, 8, is_open=False, now=now)
        times.note_output(100, 4096, is_open=False, now=now)
        times.note_output(200, 30_000, is_open=True, now=now)
    assert times.decode_s(8, is_open=False) == pytest.approx(7 * 0.02)
    assert times.decode_s(4096, is_open=False) == pytest.approx(99 * 0.02)
    assert times.decode_s(30_000, is_open=True) == pytest.approx(199 * 0.02)
