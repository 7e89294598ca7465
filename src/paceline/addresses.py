"""Addresses of our own servers, and how channels to them are made."""

from typing import NamedTuple
from urllib.parse import urlsplit

CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)
"""For each channel to a server of ours. A proxy that http_proxy names is there to reach the
internet, and often cannot reach this machine or its neighbours."""


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
