"""What a router calls its lag: neither too much, nor that of others."""

import asyncio
import time

import pytest
from router_deployment import until

from paceline.router.lag import TICK_S, WINDOW_S, Lag, LagWindow, LoopLag, MessageDelay, watch_loop


def tick(lag: LoopLag, pause_s: float, now: float) -> None:
    """A timer that comes late by a pause, through which the loop computed."""
    lag.tick(pause_s, pause_s + TICK_S, pause_s, now)


def test_without_samples_there_is_no_lag() -> None:
    assert LoopLag().lag(100.0) == Lag(0.0, 0.0)


def test_pauses_one_after_the_other_are_the_lag() -> None:
    lag, now = LoopLag(), 0.0
    for _ in range(10):
        now += 2.0 + TICK_S
        tick(lag, 2.0, now)
    assert lag.lag(now) == (pytest.approx(2.0), pytest.approx(2.0))


def test_one_pause_shows_as_the_maximum_and_hardly_in_the_mean() -> None:
    lag, now = LoopLag(), 0.0
    for number in range(50):
        pause_s = 1.2 if number == 25 else 0.0
        now += pause_s + TICK_S
        tick(lag, pause_s, now)
    mean_s, max_s = lag.lag(now)
    assert max_s == pytest.approx(1.2)
    assert mean_s < 0.4


def test_lag_is_forgotten_after_the_window() -> None:
    window = LagWindow()
    window.add(3.0, 1.0, 0.0)
    assert window.lag(WINDOW_S - 0.1) == Lag(3.0, 3.0)
    assert window.lag(WINDOW_S + 0.1) == Lag()


def test_the_window_is_bounded_however_much_comes() -> None:
    window = LagWindow()
    for number in range(100_000):
        window.add(0.1, 1.0, number * 0.001)
    assert len(window._buckets) <= WINDOW_S + 1


def test_a_message_is_late_beyond_the_fastest_one_whatever_the_clocks_say() -> None:
    for offset_s in (-1e6, 0.0, 1e6):
        delay = MessageDelay()
        assert delay.of(offset_s + 10.0, 10.5) == 0.0
        assert delay.of(offset_s + 11.0, 11.2) == 0.0
        assert delay.of(offset_s + 12.0, 14.2) == pytest.approx(2.0)


def test_clocks_that_drift_apart_do_not_add_up_to_a_delay() -> None:
    delay = MessageDelay()
    last_s = 0.0
    for number in range(100_000):
        last_s = delay.of(number * 0.1 * (1 - 1e-4), number * 0.1)
    assert last_s < 0.02


def test_messages_that_wait_while_the_loop_is_busy_are_lag_though_no_timer_is_late() -> None:
    lag = LoopLag()
    lag.tick(0.02, TICK_S + 0.02, TICK_S, 1.0)
    assert lag.message(2.0, 1.1) == 2.0
    assert lag.lag(1.1) == Lag(2.0, 2.0)


def test_messages_that_come_late_to_an_idle_loop_are_not_its_lag() -> None:
    lag = LoopLag()
    lag.tick(0.0, TICK_S, 0.01, 1.0)
    assert lag.message(2.0, 1.1) == 0.0
    assert lag.lag(1.1).max_s == 0.0


async def test_a_loop_that_stands_still_is_seen() -> None:
    lag, loop = LoopLag(), asyncio.get_running_loop()
    watching = asyncio.create_task(watch_loop(lag))
    await asyncio.sleep(0)
    time.sleep(TICK_S + 0.3)  # noqa: ASYNC251  # this is the pause
    await until(lambda: lag.lag(loop.time()).max_s > 0.0, "the watch has ticked")
    watching.cancel()
    assert lag.lag(loop.time()).max_s >= 0.25
