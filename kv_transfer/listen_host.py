"""The address on which peers reach this worker, `kv.listen_host`, and its network interface."""

import ipaddress
import socket

import psutil

from paceline.errors import ConfigError


def check_listen_host(host: str) -> str:
    """Return its address; raise ConfigError when this host cannot listen there."""
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
    return str(address)


def interface_of(address: str) -> str | None:
    """Name the network interface that has this address; None when none is known to."""
    interfaces = psutil.net_if_addrs()
    for name, entries in interfaces.items():
        if any(entry.address == address for entry in entries):
            return name
    # All of 127.0.0.0/8 is the loopback interface's, which lists one of them.
    is_loopback = ipaddress.ip_address(address).is_loopback
    return interface_of("127.0.0.1") if is_loopback and address != "127.0.0.1" else None
