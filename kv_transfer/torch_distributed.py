"""Transport `torch_distributed`: a process group of two for each owner and reader, on first use.

    reader                    owner
      Ask 1, Ask 2 ──────────▶ is the lease readable?
      ◀────────── Go 1, gen 1  both build communicator 1, keys by Put
      ◀═════════════ blocks 1
      ◀────────── No 2         the lease has gone

The owner serves a reader's asks in their order, one at a time; each side works on one thread for
each pair: with a thread for all pairs, one stopped peer would hold up everyone's reads, and two
workers that read from each other would wait in a circle. The threads start with the first read.

Whatever fails on the wire drops the communicator and fails the read that it carried. The reader
asks again for those behind it, and they build another communicator, under the next generation.

Pools in CPU memory use Gloo, pools in GPU memory NCCL: the same protocol, another communicator. A
NCCL communicator may not notice that its peer has died; the end of the session or the read's
deadline ends its waits then.
"""

import json
import logging
import time
from typing import NamedTuple

from paceline.errors import ConfigError, TransportError
from paceline.kv_transfer.communicator import CommunicatorFactory
from paceline.kv_transfer.gloo_communicator import GlooCommunicators
from paceline.kv_transfer.nccl import NcclGroups
from paceline.kv_transfer.pair_owner import PairOwner
from paceline.kv_transfer.pair_reader import PairReader
from paceline.kv_transfer.staged_connect import StagedCommunicators
from paceline.kv_transfer.transport import Channel, IsReadable, LocalPool

logger = logging.getLogger(__name__)


def communicators_for(
    pool: LocalPool, read_timeout_s: float, listen_host: str
) -> CommunicatorFactory:
    """Choose by the pool's memory; raise ConfigError when this host cannot serve it."""
    block_bytes = pool.layout.block_bytes
    match pool.blocks.device.type:
        case "cpu":
            return GlooCommunicators(listen_host, block_bytes)
        case "cuda":
            groups = NcclGroups(pool.blocks.device, block_bytes, listen_host, read_timeout_s)
            return StagedCommunicators(groups.make_wire)
        case other:
            raise ConfigError(
                f"torch_distributed moves pools in CPU or CUDA memory, this one is on {other}"
            )


class TorchDistributedTransport:
    """Owner of a pool and reader into it."""

    name = "torch_distributed"

    def __init__(
        self, pool: LocalPool, read_timeout_s: float, communicators: CommunicatorFactory
    ) -> None:
        """communicators: closed with this transport."""
        self._pool = pool
        self._read_timeout_s = read_timeout_s
        self._communicators = communicators
        self._pairs: list[PairReader | PairOwner] = []

    def endpoint(self) -> bytes:
        pool = self._pool
        fields = _Endpoint(pool.num_blocks, pool.layout.block_bytes, pool.blocks.device.type)
        return json.dumps(fields).encode()

    def accept(self, reader: str, channel: Channel, is_readable: IsReadable) -> PairOwner:
        peer = PairOwner(
            reader, self._pool, channel, is_readable, self._communicators, self._read_timeout_s
        )
        self._remember(peer)
        return peer

    def connect(
        self, owner: str, owner_incarnation: int, endpoint: bytes, channel: Channel
    ) -> PairReader:
        theirs, ours = _Endpoint.decode(endpoint), _Endpoint.decode(self.endpoint())
        if theirs.device_type != ours.device_type:
            raise TransportError(
                f"the pool of {owner} is in {theirs.device_type} memory, this one in "
                f"{ours.device_type} memory, and torch_distributed moves blocks between pools of "
                "one kind. Give all workers of the deployment the same kind of device"
            )
        if theirs.block_bytes != ours.block_bytes:
            raise TransportError(
                f"a block of {owner} has {theirs.block_bytes} bytes, here it has "
                f"{ours.block_bytes}: the two pools differ in layout"
            )
        connection = PairReader(
            owner,
            theirs.num_blocks,
            self._pool,
            channel,
            self._communicators,
            self._read_timeout_s,
        )
        self._remember(connection)
        return connection

    def close(self) -> None:
        for pair in self._pairs:
            pair.close()
        deadline = time.monotonic() + self._read_timeout_s
        for pair in self._pairs:
            if not pair.end.join(max(0.0, deadline - time.monotonic())):
                logger.error("a transfer thread did not end; pair=%s", pair.end.peer)
        self._pairs.clear()
        self._communicators.close()

    def _remember(self, pair: "PairReader | PairOwner") -> None:
        self._pairs = [known for known in self._pairs if not known.end.has_ended]
        self._pairs.append(pair)


class _Endpoint(NamedTuple):
    """What readers must know of a pool."""

    num_blocks: int
    block_bytes: int
    device_type: str

    @classmethod
    def decode(cls, endpoint: bytes) -> "_Endpoint":
        try:
            num_blocks, block_bytes, device_type = json.loads(endpoint)
            return cls(int(num_blocks), int(block_bytes), str(device_type))
        except (ValueError, TypeError) as error:
            raise TransportError(
                f"the endpoint {endpoint[:80]!r} is not one of torch_distributed: the owner runs "
                "another version of paceline or another transport"
            ) from error
