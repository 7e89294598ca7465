"""The load generator's connection to a router."""

import socket

import grpc
import pytest

from paceline.bench import client
from paceline.bench.client import LoadClient
from paceline.errors import ConfigError, UnavailableError


async def test_a_router_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(
            UnavailableError, match=rf"no router answers at {address} within 0\.2 s"
        ):
            await LoadClient(address, timeout_s=1.0).__aenter__()


async def test_a_server_that_is_no_router_is_named() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with LoadClient(f"127.0.0.1:{port}", timeout_s=1.0) as load:
        with pytest.raises(UnavailableError, match=r"UNIMPLEMENTED.* a router of paceline"):
            await load.vocabulary()
    await server.stop(None)


async def test_an_address_of_another_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="--address: 'localhost' is not an address"):
        LoadClient("localhost", timeout_s=1.0)
