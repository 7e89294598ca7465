"""When a GPU passed an event, on the CPU's clock, though nobody looked at that moment."""

import time
from typing import NamedTuple

import torch

MAX_GAP_S = 10.0
"""Between two events of which one dates the other: clocks drift, by 0.1 ms a second perhaps."""


class _Passed(NamedTuple):
    event: torch.cuda.Event
    time_s: float


class DeviceClock:
    """Takes events in the order of their recording.

    One that was waited for tells the time; one that had passed before is dated by what the GPU
    counted since the event before it, or as now after a long gap.
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
        last = self._last
        if had_passed and last is not None and time_s - last.time_s < MAX_GAP_S:
            time_s = min(time_s, last.time_s + last.event.elapsed_time(event) / 1000.0)
        self._last = _Passed(event, time_s)
        return time_s
