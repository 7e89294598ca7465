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
        seconds = self._seconds.get(_size(num_tokens), 0.0)
        return max(0.0, seconds * (1.0 - MARGIN_SHARE) - MARGIN_S)

    def note(self, num_tokens: int, seconds: float, *, was_over: bool) -> None:
        """Take what a step took; was_over: at most, since it was over before one looked."""
        size = _size(num_tokens)
        known = self._seconds.get(size)
        if was_over:
            if known is not None:  # perhaps the device waited for the next step
                self._seconds[size] = 0.9 * min(known, seconds)
        elif known is None or seconds < known:
            self._seconds[size] = seconds
        else:
            self._seconds[size] = known + (seconds - known) / 8


def _size(num_tokens: int) -> int:
    """Round down to one of four sizes between powers of 2."""
    shift = max(0, num_tokens.bit_length() - 3)
    return num_tokens >> shift << shift
