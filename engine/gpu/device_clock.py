"""When a GPU passed an event, on the CPU's clock, though nobody looked at that moment."""

import time
from typing import NamedTuple

import torch


class _Passed(NamedTuple):
    event: torch.cuda.Event
    time_s: float


class DeviceClock:
    """Takes events in the order of their recording.

    One that was waited for tells the time; one that had passed before is dated by what the GPU
    counted since the event before it.
    """

    def __init__(self) -> None:
        self._last: _Passed | None = None

    def record(self) -> torch.cuda.Event:
        """Record an event in the current stream."""
        # A wait for it sleeps: the io thread has better use for the core.
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, event: torch.cuda.Event) -> float:
        """Wait for an event; return when the GPU passed it, in seconds of time.monotonic."""
        had_passed = bool(event.query())  # type: ignore[no-untyped-call]
        event.synchronize()
        time_s = time.monotonic()
        if had_passed and self._last is not None:
            passed_s = self._last.time_s + self._last.event.elapsed_time(event) / 1000.0
            time_s = min(time_s, passed_s)
        self._last = _Passed(event, time_s)
        return time_s
