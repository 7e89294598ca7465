"""How long requests wait and run, estimated from those before them. Pure.

Everything here errs on the low side: what has not been measured yet counts as no time at all.
"""

import math

_WEIGHT = 1 / 32  # of a new sample: some thirty are remembered
_MEMORY_S = 2.0  # a sample that comes this long after the one before outweighs all earlier ones
_MIN_DEPARTURES = 8.0
_SHRINK = 0.1


class RunningMean:
    """A mean in which new samples count more, the more so the older the others are."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._last_s = 0.0

    def add(self, sample: float, now: float) -> None:
        self.value = (
            sample if self.value is None else self.value + self._weight(now) * (sample - self.value)
        )
        self._last_s = now

    def _weight(self, now: float) -> float:
        return max(_WEIGHT, -math.expm1((self._last_s - now) / _MEMORY_S))


class RunningFit:
    """A line through samples (x, y) that never falls: y = mean(y) + slope (x - mean(x)).

    The slope is that of least squares, made smaller where the samples hardly differ in x.
    """

    def __init__(self) -> None:
        self._x, self._y = RunningMean(), RunningMean()
        self._xx, self._xy = RunningMean(), RunningMean()

    def add(self, x: float, y: float, now: float) -> None:
        for mean, sample in ((self._x, x), (self._y, y), (self._xx, x * x), (self._xy, x * y)):
            mean.add(sample, now)

    def at(self, x: float) -> float | None:
        """Estimate y, at least 0; None without any sample."""
        mean_x, mean_y, mean_xx, mean_xy = (
            mean.value for mean in (self._x, self._y, self._xx, self._xy)
        )
        if mean_x is None or mean_y is None or mean_xx is None or mean_xy is None:
            return None
        spread = mean_xx - mean_x**2 + (_SHRINK * mean_x) ** 2
        slope = max(0.0, (mean_xy - mean_x * mean_y) / spread) if spread > 0 else 0.0
        return max(0.0, mean_y + slope * (x - mean_x))


class QueuePace:
    """How fast work leaves a queue that has work all the time.

    The time in which the queue is empty does not count: then work leaves as it comes, which says
    nothing of what the workers can do.
    """

    def __init__(self) -> None:
        self._num, self._num_tokens, self._busy_s = 0.0, 0.0, 0.0
        self._waits_since_s: float | None = None

    def waits(self, now: float) -> None:
        """Note that work is left in the queue because no worker has room."""
        if self._waits_since_s is None:
            self._waits_since_s = now

    def is_empty(self) -> None:
        """Note that nothing is left in the queue."""
        self._waits_since_s = None

    def left(self, num_tokens: int, now: float) -> None:
        """Note that work has left the queue for a worker."""
        if self._waits_since_s is None:
            return
        keep = 1 - _WEIGHT
        self._num = self._num * keep + 1
        self._num_tokens = self._num_tokens * keep + num_tokens
        self._busy_s = self._busy_s * keep + now - self._waits_since_s
        self._waits_since_s = now

    def forget(self) -> None:
        """Start again, because the workers have changed."""
        self._num, self._num_tokens, self._busy_s = 0.0, 0.0, 0.0

    def wait_s(self, num_ahead: float, num_tokens_ahead: float) -> float | None:
        """Estimate when work with that much ahead of it leaves; None: not enough is known.

        By requests and by prompt tokens, and the sooner of the two: either may be what limits.
        """
        if self._num < _MIN_DEPARTURES:
            return None
        return self._busy_s * min(
            num_ahead / self._num, num_tokens_ahead / max(1.0, self._num_tokens)
        )


class ServiceTimes:
    """How long work takes from its dispatch to its last token."""

    def __init__(self) -> None:
        self._first_token = RunningFit()
        self._inter_token = RunningMean()
        self._output_shares: dict[int | None, RunningMean] = {}
        """Output tokens as a share of max_tokens, by the magnitude of max_tokens: those that ask
        for much and those that ask for little are not alike. None: the client left it open."""

    def note_first_token(self, num_tokens: int, took_s: float, now: float) -> None:
        """Learn from a prompt; `num_tokens` are those that its worker had to compute until its
        end."""
        self._first_token.add(num_tokens, took_s, now)

    def note_inter_token(self, inter_token_s: float, now: float) -> None:
        self._inter_token.add(inter_token_s, now)

    def note_output(self, num_output: int, max_tokens: int, *, is_open: bool, now: float) -> None:
        """Learn from a choice that came to its end; `is_open`: its client gave no max_tokens."""
        key = None if is_open else max_tokens.bit_length()
        share = self._output_shares.setdefault(key, RunningMean())
        share.add(num_output / max_tokens, now)

    def first_token_s(self, num_tokens: float) -> float:
        return self._first_token.at(num_tokens) or 0.0

    def decode_s(self, max_tokens: int, *, is_open: bool) -> float:
        """Estimate the time from the first to the last token."""
        share = self._output_shares.get(None if is_open else max_tokens.bit_length())
        if share is None or share.value is None or self._inter_token.value is None:
            return 0.0
        return max(0.0, share.value * max_tokens - 1) * self._inter_token.value
