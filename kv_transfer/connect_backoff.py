"""When a pair whose connects keep failing is tried again."""

import logging

logger = logging.getLogger(__name__)

# One failure may be a peer that restarts.
MIN_FAILURES = 3
MIN_PAUSE_S, MAX_PAUSE_S = 1.0, 30.0


class ConnectBackoff:
    """Failed connects to one peer, in a row. Times are of `time.monotonic`; not thread-safe."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._num_failures = 0
        self._pause_s = MIN_PAUSE_S
        self._ends_s = 0.0
        self._reason = ""

    def connected(self) -> None:
        if self._num_failures >= MIN_FAILURES:
            logger.info(
                "event=kv_pair_connects_again peer=%s num_failures=%d",
                self._peer,
                self._num_failures,
            )
        self._num_failures = 0
        self._pause_s = MIN_PAUSE_S

    def failed(self, reason: str, now: float) -> None:
        self._num_failures += 1
        self._reason = reason
        if self._num_failures < MIN_FAILURES:
            return
        self._ends_s = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)
        if self._num_failures == MIN_FAILURES:
            logger.error(
                "event=kv_pair_cannot_connect peer=%s num_failures=%d error=%r",
                self._peer,
                self._num_failures,
                reason,
            )

    def refusal(self, now: float) -> str | None:
        """Return why no connect may begin now; None when one may."""
        if now >= self._ends_s:
            return None
        return (
            f"the last {self._num_failures} connects to {self._peer} failed; the next is in "
            f"{self._ends_s - now:.1f} s ({self._reason})"
        )
