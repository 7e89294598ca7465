"""Choose how two workers move KV blocks: the fastest transport that works between them.

`build_transport` gives a worker one transport, which stands for all that its settings allow. Owners
serve each of them; a reader takes the first that reaches the owner, measures it, says which it took
and how fast it is, and refuses it when it is slower than `kv.min_transport_gb_per_s`.
"""

import base64
import json
from collections.abc import Sequence

from paceline.errors import ConfigError, TransportError
from paceline.kv_transfer.pool_memory import PoolMemory
from paceline.kv_transfer.selected import (
    NamedPeer,
    SelectedConnection,
    SelectedOwnerPeer,
    TaggedChannel,
)
from paceline.kv_transfer.settings import KvSettings
from paceline.kv_transfer.shm import ShmTransport
from paceline.kv_transfer.torch_distributed import TorchDistributedTransport, communicators_for
from paceline.kv_transfer.transport import Channel, IsReadable, LocalPool, Transport

FASTEST_FIRST = ("shm", "torch_distributed")


def build_transport(
    settings: KvSettings, pool: LocalPool, memory: PoolMemory | None
) -> "SelectingTransport":
    """Build what `kv.transport` names. `memory` holds `pool.blocks` and stays the caller's; None
    when they are not in CPU memory.

    Raises ConfigError when this host cannot serve it.
    """
    candidates: list[Transport] = []
    for name in FASTEST_FIRST:
        if settings.transport not in ("auto", name):
            continue
        if name == "shm" and memory is not None:
            candidates.append(ShmTransport(pool, memory, settings.read_timeout_s))
        elif name == "torch_distributed":
            communicators = communicators_for(pool, settings.read_timeout_s, settings.listen_host)
            candidates.append(
                TorchDistributedTransport(pool, settings.read_timeout_s, communicators)
            )
    if not candidates:
        raise ConfigError(
            f"kv.transport is {settings.transport}, which maps CPU memory, and the KV blocks of "
            f"{pool.worker_id} are on {pool.blocks.device}. Set kv.transport to auto or "
            "torch_distributed"
        )
    return SelectingTransport(settings.transport, candidates, settings.min_transport_gb_per_s)


class SelectingTransport:
    """Several transports as one; satisfies `Transport`."""

    def __init__(self, name: str, candidates: Sequence[Transport], min_gb_per_s: float) -> None:
        """candidates: the fastest first; they are closed with this one."""
        self.name = name
        self._candidates = tuple(candidates)
        self._min_gb_per_s = min_gb_per_s

    def endpoint(self) -> bytes:
        endpoints = {
            candidate.name: base64.b64encode(candidate.endpoint()).decode()
            for candidate in self._candidates
        }
        return json.dumps(endpoints).encode()

    def accept(self, reader: str, channel: Channel, is_readable: IsReadable) -> SelectedOwnerPeer:
        peers = []
        for candidate in self._candidates:
            tagged = TaggedChannel(channel, candidate.name)
            peers.append(NamedPeer(candidate.name, candidate.accept(reader, tagged, is_readable)))
        return SelectedOwnerPeer(peers)

    def connect(
        self, owner: str, owner_incarnation: int, endpoint: bytes, channel: Channel
    ) -> SelectedConnection:
        """Connect over the first candidate that reaches the owner.

        Raises TransportError with each one's reason when none does.
        """
        endpoints = _decode_endpoints(endpoint)
        reasons: list[str] = []
        for candidate in self._candidates:
            encoded = endpoints.get(candidate.name)
            if encoded is None:
                reasons.append(f"{owner} does not serve {candidate.name}")
                continue
            tagged = TaggedChannel(channel, candidate.name)
            try:
                connection = candidate.connect(owner, owner_incarnation, encoded, tagged)
            except TransportError as error:
                reasons.append(f"{candidate.name}: {error}")
                continue
            return SelectedConnection(
                candidate.name, owner, connection, self._min_gb_per_s, "; ".join(reasons)
            )
        raise TransportError(f"no transport reaches {owner}. {'; '.join(reasons)}")

    def close(self) -> None:
        for candidate in self._candidates:
            candidate.close()


def _decode_endpoints(endpoint: bytes) -> dict[str, bytes]:
    try:
        return {name: base64.b64decode(text) for name, text in json.loads(endpoint).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise TransportError(
            f"the endpoint {endpoint[:80]!r} names no transports ({error}); the owner runs another "
            "version of paceline"
        ) from error
