"""What a step is expected to take, so that the next one is planned late, and in time."""

import pytest

from paceline.worker.step_times import MARGIN_S, MARGIN_SHARE, StepTimes

KEPT = 1.0 - MARGIN_SHARE


def test_a_size_that_was_never_seen_leaves_no_time() -> None:
    times = StepTimes()
    times.note(1000, 0.02, was_over=False)
    assert times.time_to_spare(500) == 0.0
    assert times.time_to_spare(1000) == pytest.approx(0.02 * KEPT - MARGIN_S)
    assert times.time_to_spare(900) == times.time_to_spare(1000)  # about as many tokens


def test_short_steps_leave_no_time() -> None:
    times = StepTimes()
    times.note(1, MARGIN_S, was_over=False)
    assert times.time_to_spare(1) == 0.0


def test_a_faster_step_is_believed_at_once_and_a_slower_one_after_many() -> None:
    times = StepTimes()
    for seconds in (0.03, 0.02):
        times.note(64, seconds, was_over=False)
    fast = times.time_to_spare(64)
    assert fast == pytest.approx(0.02 * KEPT - MARGIN_S)
    times.note(64, 0.04, was_over=False)
    assert fast < times.time_to_spare(64) < fast + 0.005
    for _ in range(60):
        times.note(64, 0.04, was_over=False)
    assert times.time_to_spare(64) == pytest.approx(0.04 * KEPT - MARGIN_S, rel=0.01)


def test_planning_too_late_again_and_again_ends_in_planning_at_once() -> None:
    times = StepTimes()
    times.note(8, 0.01, was_over=True)  # not known how long it took
    assert times.time_to_spare(8) == 0.0
    times.note(8, 0.01, was_over=False)
    spare = []
    for _ in range(20):
        spare.append(times.time_to_spare(8))
        times.note(8, 0.012, was_over=True)
    assert spare == sorted(spare, reverse=True)
    assert times.time_to_spare(8) == 0.0
