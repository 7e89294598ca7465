"""Choose how two workers move KV blocks: the fastest transport that works between them, proved by a probe.

`build_transport` gives a worker one transport, which stands for all that its settings allow. Owners
serve each of them; a reader takes the first that reaches the owner, measures it, says which it took
and how fast it is, and refuses it when it is slower than `kv.min_transport_gb_per_s`.
"""

import base64
import json
import logging
from collections.abc import Callable, Sequence

from paceline.errors import TransportError
from paceline.kv_transfer.pool_memory import PoolMemory
from paceline.kv_transfer.probe import ProbedConnection
from paceline.kv_transfer.settings import KvSettings
from paceline.kv_transfer.shm import ShmTransport
from paceline.kv_transfer.torch_distributed import TorchDistributedTransport
from paceline.kv_transfer.transport import (
    Channel,
    IsReadable,
    LocalPool,
    OwnerPeer,
    Transport,
)

logger = logging.getLogger(__name__)


def build_transport(
    settings: KvSettings, pool: LocalPool, memory: PoolMemory
) -> "SelectingTransport":
    """Build what `kv.transport` names. `memory` is the caller's, and holds `pool.blocks`."""
    build: dict[str, Callable[[], Transport]] = {
        # The fastest first.
        "shm": lambda: ShmTransport(pool, memory, settings.read_timeout_s),
        "torch_distributed": lambda: TorchDistributedTransport(
            pool, settings.read_timeout_s, settings.listen_host
        ),
    }
    names = list(build) if settings.transport == "auto" else [settings.transport]
    return SelectingTransport(
        settings.transport, [build[name]() for name in names], settings.min_transport_gb_per_s
    )


class SelectingTransport:
    """Several transports as one; satisfies `Transport`."""

    def __init__(
        self, name: str, candidates: Sequence[Transport], min_gb_per_s: float = 0.0
    ) -> None:
        """candidates: the fastest first; closed with this one."""
        self.name = name
        self._candidates = list(candidates)
        self._min_gb_per_s = min_gb_per_s

    def endpoint(self) -> bytes:
        return json.dumps(
            {
                candidate.name: base64.b64encode(candidate.endpoint()).decode()
                for candidate in self._candidates
            }
        ).encode()

    def accept(self, reader: str, channel: Channel, is_readable: IsReadable) -> "SelectedOwnerPeer":
        return SelectedOwnerPeer(
            [
                candidate.accept(reader, _TaggedChannel(channel, candidate.name), is_readable)
                for candidate in self._candidates
            ],
            [candidate.name for candidate in self._candidates],
        )

    def connect(
        self, owner: str, owner_incarnation: int, endpoint: bytes, channel: Channel
    ) -> ProbedConnection:
        """Connect over the first candidate that reaches the owner.

        Raises TransportError with each one's reason when none does.
        """
        endpoints = _decode_endpoints(endpoint)
        reasons = []
        for candidate in self._candidates:
            if candidate.name not in endpoints:
                reasons.append(f"{candidate.name}: {owner} does not offer it")
                continue
            tagged = _TaggedChannel(channel, candidate.name)
            try:
                connection = candidate.connect(
                    owner, owner_incarnation, endpoints[candidate.name], tagged
                )
            except TransportError as error:
                reasons.append(f"{candidate.name}: {error}")
                continue
            for reason in reasons:
                logger.info("event=kv_transport_skipped owner=%s reason=%r", owner, reason)
            return ProbedConnection(candidate.name, owner, connection, self._min_gb_per_s)
        raise TransportError(f"no transport reaches {owner}. {'; '.join(reasons)}")

    def close(self) -> None:
        for candidate in self._candidates:
            candidate.close()


class SelectedOwnerPeer:
    """The owner's ends of all candidates, of which the reader uses one."""

    def __init__(self, peers: Sequence[OwnerPeer], names: Sequence[str]) -> None:
        self._peers = list(zip(names, peers, strict=True))

    def on_message(self, payload: bytes) -> None:
        name, message = split_tag(payload)
        for known, peer in self._peers:
            if known == name:
                peer.on_message(message)
                return
        raise TransportError(f"the reader sent a message for transport {name}, which is not served")

    def close(self) -> None:
        for _, peer in self._peers:
            peer.close()


class _TaggedChannel:
    """Puts the name of its transport before each message."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._tag = name.encode() + b"\0"

    def send(self, payload: bytes) -> None:
        self._channel.send(self._tag + payload)
