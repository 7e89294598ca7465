"""When a GPU passed an event, with events whose times a test sets."""

import time
from typing import Any

import pytest
import torch

from paceline.engine.gpu.device_clock import MAX_GAP_S, DeviceClock


class FakeEvent:
    """One that the device passed, or passes when it is waited for, at `device_ms`."""

    def __init__(self, device_ms: float, *, had_passed: bool) -> None:
        self.device_ms = device_ms
        self._has_passed = had_passed

    def query(self) -> bool:
        return self._has_passed

    def synchronize(self) -> None:
        self._has_passed = True

    def elapsed_time(self, later: "FakeEvent") -> float:
        return later.device_ms - self.device_ms


def wait(clock: DeviceClock, event: Any) -> float:
    return clock.wait(event)


def test_an_event_that_had_passed_is_dated_by_the_device() -> None:
    clock, before = DeviceClock(), time.monotonic()
    first = wait(clock, FakeEvent(1000.0, had_passed=False))
    assert before <= first <= time.monotonic()
    time.sleep(0.05)
    assert wait(clock, FakeEvent(1010.0, had_passed=True)) == pytest.approx(first + 0.010)
    assert wait(clock, FakeEvent(1030.0, had_passed=True)) == pytest.approx(first + 0.030)


def test_one_that_was_waited_for_is_dated_now_and_none_later_than_now() -> None:
    clock = DeviceClock()
    wait(clock, FakeEvent(0.0, had_passed=True))
    before = time.monotonic()
    assert before <= wait(clock, FakeEvent(5.0, had_passed=False))
    assert wait(clock, FakeEvent(1e6, had_passed=True)) <= time.monotonic()


def test_after_a_long_gap_clocks_have_drifted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = DeviceClock(), time.monotonic()
    first = wait(clock, FakeEvent(0.0, had_passed=False))
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * MAX_GAP_S)
    assert wait(clock, FakeEvent(1000.0, had_passed=True)) == now + 2 * MAX_GAP_S > first + 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_dates_its_own_events() -> None:
    clock = DeviceClock()
    torch.cuda.synchronize()
    idle = clock.wait(clock.record())
    torch.cuda._sleep(200_000_000)  # some 0.1 s
    busy = clock.record()
    waited = clock.wait(busy)
    assert waited - idle > 0.02
    torch.cuda._sleep(200_000_000)
    late = clock.record()
    time.sleep(3 * (waited - idle))
    passed = clock.wait(late)
    assert passed - waited == pytest.approx(waited - idle, rel=0.5)
    assert time.monotonic() - passed > waited - idle
