"""The measured rate of a prefill worker."""

import pytest

from paceline.prefill_worker.rate import PrefillRate


def test_rate_is_unknown_until_a_step_has_ended() -> None:
    rate = PrefillRate()
    rate.planned(100, 1.0)
    assert rate.tokens_per_s == 0
    rate.applied(1.1)
    assert rate.tokens_per_s == 1000


def test_step_planned_behind_another_counts_from_its_end() -> None:
    rate = PrefillRate()
    rate.planned(1000, 0.0)
    for number in range(1, 20):
        rate.planned(1000, number - 0.5)
        rate.applied(float(number))
    assert rate.tokens_per_s == 1000


def test_idle_time_does_not_count() -> None:
    rate = PrefillRate()
    for start_s in (0.0, 50.0, 100.0):
        rate.planned(300, start_s)
        rate.applied(start_s + 0.5)
    assert rate.tokens_per_s == 600


def test_rate_follows_a_worker_that_becomes_slower() -> None:
    rate = PrefillRate()
    now = 0.0
    for step_s in [0.01] * 100 + [1.0] * 30:
        rate.planned(100, now)
        now += step_s
        rate.applied(now)
    assert rate.tokens_per_s == pytest.approx(100, rel=0.05)
