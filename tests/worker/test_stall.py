"""When an engine counts as stalled."""

import math

from paceline.worker.stall import LEAST_S, LONGEST_STEPS, Stall


def test_a_step_larger_than_any_before_may_take_longer_in_proportion() -> None:
    stall = Stall(60.0)
    assert stall.limit_s(1) == 60.0
    stall.note(64, 0.4)
    assert stall.limit_s(64) == 4.0
    assert stall.limit_s(128) == 8.0
    assert stall.limit_s(64_000) == 60.0


def test_long_steps_are_no_stall() -> None:
    stall = Stall(60.0)
    stall.note(512, 1.5)
    stall.note(1, 0.01)
    limit_s = stall.limit_s(100)
    assert math.isclose(limit_s, LONGEST_STEPS * 1.5, rel_tol=0.01)


def test_the_limit_is_bounded_and_long_steps_are_forgotten() -> None:
    stall = Stall(60.0)
    stall.note(512, 100.0)
    assert stall.limit_s(1) == 60.0
    for _ in range(10_000):
        stall.note(1, 0.01)
    assert stall.limit_s(1) == LEAST_S
