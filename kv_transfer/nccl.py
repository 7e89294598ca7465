"""NCCL groups of two between pools in GPU memory.

What matters here is that a peer's death costs reads, never this process: see `_ENVIRONMENT`.

Groups are built when peers connect, after warm-up. In torch's default mode the capture of a CUDA
graph fails when another thread allocates memory or asks for an event meanwhile, as we do.
"""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paceline.errors import ConfigError, TransportError
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import OWNER_RANK, READER_RANK, describe
from paceline.kv_transfer.device_wire import DeviceWire
from paceline.kv_transfer.listen_host import check_listen_host, interface_of

logger = logging.getLogger(__name__)

# Thread blocks of a transfer; each takes a multiprocessor, of which an H200 has 132, and a buffer.
# Without a limit NCCL takes up to 32: a few transfers would fill the GPU, and workers that read
# from each other in a circle would stand still. No measurement is behind this number so far.
MAX_CTAS = 8
# The first in which two processes of a group may be on one GPU.
SHARED_GPU_VERSION = (2, 30, 0)

# Read by torch and NCCL when a group is built, and there is no other way to set them. What the user
# has set stays, but for the first.
_ENVIRONMENT = {
    # Otherwise each group has a watchdog thread, which ends the process when a transfer fails, and
    # a monitor, which ends it when the watchdog is stuck. We never wait in the way this names.
    "TORCH_NCCL_BLOCKING_WAIT": "1",
    # The flight recorder keeps events of transfers that, without a watchdog, nobody retires.
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
    # That transfers of a group follow each other is what we want.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
    # A service of NCCL's for its own command-line client, with a port of its own.
    "NCCL_RAS_ENABLE": "0",
}


class NcclGroups:
    """Builds wires over NCCL for one pool; `make_wire` is what `StagedCommunicators` calls."""

    def __init__(
        self, device: torch.device, block_bytes: int, listen_host: str, timeout_s: float
    ) -> None:
        """Raise ConfigError when this torch or this host cannot serve it."""
        if not dist.is_nccl_available():
            raise ConfigError(
                f"the pool is on {device}, and this torch ({torch.__version__}) has no NCCL: "
                "torch_distributed cannot move its blocks. Install a torch built with CUDA and NCCL"
            )
        prepare_environment(listen_host)
        warn_if_workers_cannot_share_a_gpu(_loaded_version())
        self._device = device
        self._block_bytes = block_bytes
        self._timeout_s = timeout_s

    def make_wire(self, store: ChannelStore, rank: int) -> DeviceWire:
        """Meet the peer; hangs if it goes away in the moment after `_meet`."""
        nccl: Any = dist.ProcessGroupNCCL  # absent from torch's stubs on machines without CUDA
        options = nccl.Options(is_high_priority_stream=True)
        options._timeout = timedelta(seconds=self._timeout_s)  # of an abort
        options.global_ranks_in_group = [OWNER_RANK, READER_RANK]
        options.config.blocking = 1
        options.config.max_ctas = MAX_CTAS
        with torch.cuda.device(self._device):
            group = nccl(store, rank, 2, options)
            try:
                _meet(store, rank)
                group.eager_connect_single_device(self._device)
                return DeviceWire(group, store, rank, self._device, self._block_bytes)
            except RuntimeError as error:
                group.abort()
                raise TransportError(
                    f"NCCL cannot connect: {describe(error)}{_hint(error)}"
                ) from error
            except TransportError:
                group.abort()
                raise


def prepare_environment(listen_host: str) -> None:
    """Set what NCCL and torch read from the environment of the process.

    Raises ConfigError when a variable or the address cannot work.
    """
    address = check_listen_host(listen_host)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.environ["TORCH_NCCL_BLOCKING_WAIT"] != "1":
        raise ConfigError(
            f"TORCH_NCCL_BLOCKING_WAIT is {os.environ['TORCH_NCCL_BLOCKING_WAIT']!r}: torch would "
            "end this worker when a peer that it reads from dies. Unset it"
        )
    chosen = os.environ.get("NCCL_SOCKET_IFNAME")
    source = "NCCL_SOCKET_IFNAME"
    if chosen is None and (interface := interface_of(address)) is not None:
        # Otherwise NCCL listens on whatever interface it finds first.
        chosen = os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"
        source = "kv.listen_host"
    logger.info(
        "event=nccl_interface interface=%s source=%s listen_host=%s", chosen, source, listen_host
    )


def warn_if_workers_cannot_share_a_gpu(version: tuple[int, ...]) -> None:
    """Say it at start, and no more: a worker on a shared GPU may need no peer."""
    if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" and version < SHARED_GPU_VERSION:
        logger.warning(
            "event=nccl_cannot_share_gpu NCCL_MULTI_RANK_GPU_ENABLE is 1, and NCCL %s is loaded, "
            "which ignores it: two workers on one GPU cannot exchange KV. Give each worker a GPU "
            "of its own, or install NCCL %s or newer",
            ".".join(map(str, version)),
            ".".join(map(str, SHARED_GPU_VERSION[:2])),
        )


def _loaded_version() -> tuple[int, ...]:
    """Return the version that runs: not torch's own when another was preloaded."""
    nccl: Any = dist.ProcessGroupNCCL
    if hasattr(nccl, "get_runtime_nccl_version"):
        return tuple(nccl.get_runtime_nccl_version())
    build: Any = torch.cuda.nccl
    return tuple(build.version())


def _meet(store: ChannelStore, rank: int) -> None:
    """Return when the peer is about to connect too.

    Nothing ends NCCL's connecting, so that whoever starts it alone has lost a thread. The reader
    answers, and so neither goes on when one of these messages is lost.
    """
    if rank == OWNER_RANK:
        store.set("owner is here", b"")
        store.get("reader is here")
    else:
        store.get("owner is here")
        store.set("reader is here", b"")


def _hint(error: Exception) -> str:
    text = str(error)
    if "Duplicate GPU" in text or "NCCL_MULTI_RANK_GPU_ENABLE" in text:
        return (
            ". Both workers are on one GPU: give each its own, or start them with "
            "NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL 2.30 or newer"
        )
    return ""
