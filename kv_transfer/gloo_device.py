"""Where a process takes and makes its Gloo connections."""

import ipaddress
import socket
import threading

import torch.distributed as dist

from paceline.errors import ConfigError


class GlooDevice:
    """One listener for all communicators of a transport, opened when the first is made."""

    def __init__(self, listen_host: str) -> None:
        """Raise ConfigError when this host cannot listen there."""
        _check_listen_host(listen_host)
        self._listen_host = listen_host
        self._lock = threading.Lock()
        self._device: object | None = None

    def open(self) -> object:
        with self._lock:
            if self._device is None:
                self._device = dist.ProcessGroupGloo.create_device(hostname=self._listen_host)
            return self._device

    def close(self) -> None:
        """Close the listener, once the last communicator on it has gone."""
        self._device = None


def _check_listen_host(host: str) -> None:
    try:
        address = ipaddress.ip_address(socket.gethostbyname(host))
        if address.is_unspecified:
            raise ConfigError(
                f"kv.listen_host is {host}: peers cannot connect to it, and it would listen on "
                "every interface. Set one address of this host"
            )
        with socket.socket() as probe:
            probe.bind((str(address), 0))
    except OSError as error:
        raise ConfigError(
            f"kv.listen_host is {host!r}, where this host cannot listen: {error.strerror}. Set one "
            "of its own addresses, or 127.0.0.1 when all workers are on this host"
        ) from error
