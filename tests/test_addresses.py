"""host:port as settings and flags give it."""

import pytest

from paceline.addresses import Address, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:6379", Address("10.0.0.1", 6379)),
        ("head.example.org:1", Address("head.example.org", 1)),
        ("[::1]:65535", Address("::1", 65535)),
    ],
)
def test_a_host_and_a_port_are_read(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":1", "host:0", "host:65536", "host:-1", "::1:1", "a/b:1", "a..b:1"],
)
@pytest.mark.parametrize("prefix", ["", "http://", "user@"])
def test_everything_else_is_refused(prefix: str, text: str) -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        parse_address(prefix + text)
