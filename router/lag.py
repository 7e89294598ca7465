"""How late a router is with what it should do now: its event loop has more to do than it can.

Seen in two ways. A timer shows how long the loop stands still at a time. It does not show messages
that wait for their turn, so each worker says when it made a message: the delay beyond that of its
fastest message is lag too, as long as the loop is busy. (When it is not, the worker or the network
was late.)
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from paceline.errors import OverloadedError

WINDOW_S = 5.0
"""Of the mean and the maximum: long beside a pause that does no harm."""
_BUCKET_S = 1.0
TICK_S = 0.1
_BUSY_SHARE = 0.3
"""From this share of a core on, messages that wait do so because of the loop. Not more, because on
a crowded machine a thread gets only a part of its core."""
_OFFSET_MEMORY_S = 60.0
"""How long the fastest message counts: in a minute clocks drift apart by some 5 ms at most."""


class Lag(NamedTuple):
    """Seconds, over the last few seconds."""

    mean_s: float = 0.0
    max_s: float = 0.0


@dataclass(slots=True)
class _Bucket:
    start_s: float
    sum_s: float = 0.0
    weight: float = 0.0
    max_s: float = 0.0


class LagWindow:
    """Mean and maximum of the samples of the last WINDOW_S."""

    def __init__(self) -> None:
        self._buckets: deque[_Bucket] = deque()

    def add(self, lag_s: float, weight: float, now: float) -> None:
        self._forget(now)
        if not self._buckets or now >= self._buckets[-1].start_s + _BUCKET_S:
            self._buckets.append(_Bucket(now))
        bucket = self._buckets[-1]
        bucket.sum_s += lag_s * weight
        bucket.weight += weight
        bucket.max_s = max(bucket.max_s, lag_s)

    def lag(self, now: float) -> Lag:
        self._forget(now)
        weight = sum(bucket.weight for bucket in self._buckets)
        if not weight:
            return Lag()
        return Lag(
            sum(bucket.sum_s for bucket in self._buckets) / weight,
            max(bucket.max_s for bucket in self._buckets),
        )

    def _forget(self, now: float) -> None:
        while self._buckets and self._buckets[0].start_s < now - WINDOW_S:
            self._buckets.popleft()


class MessageDelay:
    """How much longer messages of one worker take than its fastest one of the last minute or two.

    The clocks of two hosts have nothing to do with each other; only that both go equally fast
    matters.
    """

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._fastest_s = self._fastest_before_s = 0.0

    def of(self, made_s: float, now: float) -> float:
        """Take a message that was made at `made_s` by the worker's clock and came now by ours."""
        offset_s = now - made_s
        if self._since_s is None:
            self._since_s, self._fastest_s, self._fastest_before_s = now, offset_s, offset_s
        elif now - self._since_s > _OFFSET_MEMORY_S:
            self._since_s, self._fastest_before_s = now, self._fastest_s
            self._fastest_s = offset_s
        self._fastest_s = min(self._fastest_s, offset_s)
        return offset_s - min(self._fastest_s, self._fastest_before_s)


class LoopLag:
    """The lag of one router."""

    def __init__(self) -> None:
        self._timers, self._messages = LagWindow(), LagWindow()
        self._is_busy = False

    def tick(self, late_s: float, passed_s: float, cpu_s: float, now: float) -> None:
        """Take a timer that was `late_s` late, `passed_s` after the one before; meanwhile the
        loop's thread ran for `cpu_s`. A pause counts for as long as it lasted."""
        self._timers.add(max(0.0, late_s), passed_s, now)
        self._is_busy = max(cpu_s, late_s) >= _BUSY_SHARE * passed_s

    def message(self, delay_s: float, now: float) -> float:
        """Take the delay of a worker's message; return how much of it is lag."""
        lag_s = delay_s if self._is_busy else 0.0
        self._messages.add(lag_s, 1.0, now)
        return lag_s

    def lag(self, now: float) -> Lag:
        timers, messages = self._timers.lag(now), self._messages.lag(now)
        return Lag(max(timers.mean_s, messages.mean_s), max(timers.max_s, messages.max_s))


def check_lag(lag: Lag, limit_s: float) -> None:
    """Raise OverloadedError if a router that is so late should take no new request."""
    if lag.mean_s > limit_s:
        raise OverloadedError(
            f"this router is {lag.mean_s:.2f} s behind with its streams (mean of the last "
            f"{WINDOW_S:g} s, at most {lag.max_s:.2f} s), and router.max_lag_s is {limit_s:g}. Try "
            f"again in about {WINDOW_S:g} s, send to another router, or raise router.replicas",
            retry_after_s=WINDOW_S,
        )


async def watch_loop(lag: LoopLag) -> None:
    """Measure the running loop until cancelled."""
    loop = asyncio.get_running_loop()
    last_s, last_cpu_s = loop.time(), time.thread_time()
    while True:
        await asyncio.sleep(TICK_S)
        now, cpu_s = loop.time(), time.thread_time()
        passed_s = now - last_s
        lag.tick(passed_s - TICK_S, passed_s, cpu_s - last_cpu_s, now)
        last_s, last_cpu_s = now, cpu_s
