"""The two ends of a connection whose transport was chosen: messages carry the transport's name."""

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from paceline.errors import TransportError
from paceline.kv_transfer.read_handle import PendingRead
from paceline.kv_transfer.transport import (
    Channel,
    Connection,
    OwnerPeer,
    ReadHandle,
    ReadOutcome,
    ReadState,
)

logger = logging.getLogger(__name__)

# A millisecond over shared memory, ten over 800 MB/s: a steady rate that delays nobody.
PROBE_BYTES = 8 << 20
# The first time a pair is made may take longer than a read may, and a peer may be starting.
MAX_FAILED_PROBES = 3
MIN_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0


class NamedPeer(NamedTuple):
    name: str
    peer: OwnerPeer


class TaggedChannel:
    """Puts the name of its transport before each message."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._tag = name.encode() + b"\0"

    def send(self, payload: bytes) -> None:
        self._channel.send(self._tag + payload)


class SelectedOwnerPeer:
    """The owner's ends of all transports that it serves; the reader uses one of them."""

    def __init__(self, peers: Sequence[NamedPeer]) -> None:
        self._peers = peers

    def on_message(self, payload: bytes) -> None:
        name, message = _split_tag(payload)
        for known, peer in self._peers:
            if known == name:
                peer.on_message(message)
                return
        raise TransportError(f"a message for transport {name!r}, which is not served here")

    def close(self) -> None:
        for _, peer in self._peers:
            peer.close()


class SelectedConnection:
    """The reader's end of the chosen transport; measures it first. Satisfies `Connection`."""

    def __init__(
        self, name: str, owner: str, connection: Connection, min_gb_per_s: float, reason: str
    ) -> None:
        """reason: why no faster transport was chosen; empty when there is none."""
        self.transport = name
        """Name of the transport that moves the blocks."""
        self.gb_per_s: float | None = None
        """Rate of the probe; None until it has ended well."""
        self._owner = owner
        self._connection = connection
        self._min_gb_per_s = min_gb_per_s
        self._reason = reason
        self._refusal: str | None = None
        self._is_closing = False
        self._num_failed_probes = 0
        self._pause_s = MIN_PAUSE_S
        self._next_probe_s: float | None = None
        """When to probe again, by `time.monotonic`; None while a probe runs and after a good one.
        """
        self._measure()

    def read(self, lease_id: int, sources: Sequence[int], targets: Sequence[int]) -> ReadHandle:
        if self._next_probe_s is not None and time.monotonic() >= self._next_probe_s:
            self._next_probe_s = None
            self._measure()
        if self._refusal is None:
            return self._connection.read(lease_id, sources, targets)
        read = PendingRead(0)
        read.fail(self._refusal)
        return read

    def probe(self, num_bytes: int) -> ReadHandle:
        return self._connection.probe(num_bytes)

    def on_message(self, payload: bytes) -> None:
        name, message = _split_tag(payload)
        if name != self.transport:
            raise TransportError(f"a message for transport {name!r}, here is {self.transport}")
        self._connection.on_message(message)

    def close(self) -> None:
        self._is_closing = True
        self._connection.close()

    def _measure(self) -> None:
        """Probe twice: the first pays for page faults and for the pairing, the second is timed.

        Both end before any later read starts.
        """
        self._connection.probe(PROBE_BYTES).add_done_callback(self._begin_measure)
        self._connection.probe(PROBE_BYTES).add_done_callback(self._end_measure)

    def _begin_measure(self, outcome: ReadOutcome) -> None:
        self._first = outcome

    def _end_measure(self, outcome: ReadOutcome) -> None:
        if self._is_closing:
            return
        # Behind a failed one, the second pays for the pairing and tells no rate.
        failed = next((o for o in (self._first, outcome) if o.state is ReadState.FAILED), None)
        if failed is None:
            self._judge(outcome)
        else:
            self._probe_later(failed.error)

    def _probe_later(self, reason: str) -> None:
        """Let a read that comes after a pause probe again; refuse reads once it failed often."""
        self._num_failed_probes += 1
        error = f"a probe of {self.transport} from {self._owner} failed: {reason}"
        logger.warning("event=kv_probe_failed owner=%s error=%r", self._owner, error)
        if self._min_gb_per_s and self._num_failed_probes >= MAX_FAILED_PROBES:
            self._refusal = error
        self._next_probe_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, MAX_PAUSE_S)

    def _judge(self, outcome: ReadOutcome) -> None:
        self._refusal = None  # of failed probes
        elapsed_s = max(1e-6, outcome.ended_s - self._first.ended_s)
        rate = self.gb_per_s = outcome.num_bytes / elapsed_s / 1e9
        logger.info(
            "event=kv_transport owner=%s transport=%s gb_per_s=%.2f reason=%r",
            self._owner,
            self.transport,
            rate,
            self._reason,
        )
        if rate < self._min_gb_per_s:
            self._refusal = (
                f"{self.transport} moves {rate:.2f} GB/s from {self._owner}, and "
                f"kv.min_transport_gb_per_s is {self._min_gb_per_s}. {self._reason or 'Lower it'}"
            )
            logger.error("event=kv_transport_refused owner=%s error=%r", self._owner, self._refusal)


def _split_tag(payload: bytes) -> tuple[str, bytes]:
    name, separator, message = payload.partition(b"\0")
    if not separator:
        raise TransportError(f"a transport message of {len(payload)} bytes names no transport")
    return name.decode(errors="replace"), message
