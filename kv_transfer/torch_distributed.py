"""Transport `torch_distributed`: a process group of two for each owner and reader, on first use.

    reader                    owner
      Ask 1, Ask 2 ──────────▶ is the lease readable?
      ◀────────── Go 1, gen 1  both build communicator 1, keys by Put
      ◀═════════════ blocks 1
      ◀────────── No 2         the lease has gone

The owner serves a reader's asks in their order, one at a time; each side works on one thread for
each pair: with a thread for all pairs, one stopped peer would hold up everyone's reads, and two
workers that read from each other would wait in a circle. The threads start with the first read.

Whatever fails on the wire drops the communicator and fails its reads; the next read builds another,
under the next generation.
"""

import json
import logging
import time

import torch

from paceline.errors import TransportError
from paceline.kv_transfer.gloo_device import GlooDevice
from paceline.kv_transfer.pair_owner import PairOwner
from paceline.kv_transfer.pair_reader import PairReader
from paceline.kv_transfer.transport import Channel, IsReadable, LocalPool

logger = logging.getLogger(__name__)


class TorchDistributedTransport:
    """Owner of a pool and reader into it. Gloo on CPUs."""

    name = "torch_distributed"

    def __init__(self, pool: LocalPool, read_timeout_s: float, listen_host: str) -> None:
        if pool.blocks.device != torch.device("cpu"):
            raise TransportError(
                f"torch_distributed moves pools in CPU memory, this one is on {pool.blocks.device}"
            )
        self._pool = pool
        self._read_timeout_s = read_timeout_s
        self._device = GlooDevice(listen_host)
        self._pairs: list[PairReader | PairOwner] = []

    def endpoint(self) -> bytes:
        pool = self._pool
        return json.dumps([pool.num_blocks, pool.layout.block_bytes]).encode()

    def accept(self, reader: str, channel: Channel, is_readable: IsReadable) -> PairOwner:
        peer = PairOwner(
            reader, self._pool, channel, is_readable, self._device, self._read_timeout_s
        )
        self._remember(peer)
        return peer

    def connect(
        self, owner: str, owner_incarnation: int, endpoint: bytes, channel: Channel
    ) -> PairReader:
        num_blocks, block_bytes = _decode_endpoint(endpoint)
        if block_bytes != self._pool.layout.block_bytes:
            raise TransportError(
                f"a block of {owner} has {block_bytes} bytes, here it has "
                f"{self._pool.layout.block_bytes}: the two pools differ in layout"
            )
        connection = PairReader(
            owner,
            num_blocks,
            self._pool,
            channel,
            self._device,
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
        self._device.close()

    def _remember(self, pair: "PairReader | PairOwner") -> None:
        self._pairs = [known for known in self._pairs if not known.end.has_ended]
        self._pairs.append(pair)


def _decode_endpoint(endpoint: bytes) -> tuple[int, int]:
    try:
        num_blocks, block_bytes = json.loads(endpoint)
        return int(num_blocks), int(block_bytes)
    except (ValueError, TypeError) as error:
        raise TransportError(
            f"the endpoint {endpoint[:80]!r} is not one of torch_distributed: the owner runs "
            "another version of paceline or another transport"
        ) from error
