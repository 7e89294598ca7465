"""How long steps take, from what the last ones of about their size took."""

MARGIN_S = 0.002
"""From when a step is planned to when the device has it; more takes the device's time."""
MARGIN_SHARE = 0.25
"""Of a step's time, more: steps of one size differ, and so does what a CPU takes to launch."""


class StepTimes:
    """Learns from steps that ended; expects rather too little than too much."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def time_to_spare(self, num_tokens: int) -> float:
        """Say for how long, from the start of a step, the next one need not be planned."""
        size = _size(num_tokens)
        known = max((known for known in self._seconds if known <= size), default=None)
        seconds = 0.0 if known is None else self._seconds[known]
        return max(0.0, seconds * (1.0 - MARGIN_SHARE) - MARGIN_S)

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take what a step took."""
        size = _size(num_tokens)
        known = self._seconds.get(size)
        if known is None or seconds < known:
            self._seconds[size] = seconds
        else:
            self._seconds[size] = known + (seconds - known) / 8


def _size(num_tokens: int) -> int:
    """Round down to one of four sizes between powers of 2."""
    shift = max(0, num_tokens.bit_length() - 3)
    return num_tokens >> shift << shift
