"""What a step is expected to take, so that the next one is planned late, and in time."""

import pytest

from paceline.worker.step_times import MARGIN_S, MARGIN_SHARE, StepTimes

KEPT = 1.0 - MARGIN_SHARE


def test_a_size_that_was_never_seen_takes_as_long_as_a_smaller_one_at_least() -> None:
    times = StepTimes()
    times.note(1000, 0.02)
    assert times.time_to_spare(500) == 0.0
    assert times.time_to_spare(1000) == pytest.approx(0.02 * KEPT - MARGIN_S)
    assert times.time_to_spare(900) == times.time_to_spare(1000)  # about as many tokens
    assert times.time_to_spare(8000) == times.time_to_spare(1000)
    times.note(4000, 0.08)
    assert times.time_to_spare(8000) == pytest.approx(0.08 * KEPT - MARGIN_S)
    assert times.time_to_spare(2000) == times.time_to_spare(1000)


def test_short_steps_leave_no_time() -> None:
    times = StepTimes()
    times.note(1, MARGIN_S)
    assert times.time_to_spare(1) == 0.0


def test_a_faster_step_is_believed_at_once_and_a_slower_one_after_many() -> None:
    times = StepTimes()
    for seconds in (0.03, 0.02):
        times.note(64, seconds)
    fast = times.time_to_spare(64)
    assert fast == pytest.approx(0.02 * KEPT - MARGIN_S)
    times.note(64, 0.04)
    assert fast < times.time_to_spare(64) < fast + 0.005
    for _ in range(60):
        times.note(64, 0.04)
    assert times.time_to_spare(64) == pytest.approx(0.04 * KEPT - MARGIN_S, rel=0.01)
