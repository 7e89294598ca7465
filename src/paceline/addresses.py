"""Addresses of servers."""

from typing import NamedTuple
from urllib.parse import urlsplit


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


def parse_address(text: str) -> Address:
    """Read host:port; an IPv6 address as a host has brackets. Raises ValueError."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
        if host and port and parts.netloc == text and parts.username is None:
            host.encode("idna")
            return Address(host, port)
    except ValueError:  # the port is no number or too large, or the host can be no name
        pass
    raise ValueError(f"{text!r} is not an address: it must be host:port, such as 10.0.0.10:6379")
