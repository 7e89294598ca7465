"""What a router tells its controller, and where one listens that replaces another."""

import asyncio
import socket
from pathlib import Path

import pytest
from router_deployment import router_deployment

from paceline.cluster import hosted_router
from paceline.cluster.hosted import HostContext
from paceline.cluster.hosted_router import HostedRouter, port_again
from paceline.cluster.process_state import ProcessName, Role
from paceline.cluster.settings import DeploymentSettings

HOST = "127.0.0.1"


async def test_a_router_reports_its_lag(tmp_path: Path) -> None:
    context = HostContext(
        name=ProcessName(Role.ROUTER, 0, 1),
        settings=DeploymentSettings.model_validate({"model": {"path": "x"}}),
        host=HOST,
        router_port=0,
        on_step=lambda name, seconds: None,
        on_progress=lambda what, share: None,
        on_failure=lambda error: None,
    )
    hosted = HostedRouter(context)
    assert hosted.load().lag_s == 0.0
    async with router_deployment(tmp_path, workers=False) as deployment:
        router = deployment.router
        hosted._router = router
        assert router._lag_task is not None
        router._lag_task.cancel()
        router._lag.tick(50.0, 50.1, 50.1, asyncio.get_running_loop().time())
        load = hosted.load()
        assert (load.lag_s > 40.0, load.max_lag_s) == (True, 50.0)


@pytest.fixture
def taken() -> socket.socket:
    """A socket that has the port of the router before."""
    taken = socket.socket()
    taken.bind((HOST, 0))
    taken.listen()
    return taken


async def test_a_port_is_waited_for_until_its_last_user_is_gone(taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    asyncio.get_running_loop().call_later(0.05, taken.close)
    assert await port_again(HOST, port) == port


async def test_a_port_that_others_keep_is_given_up(
    taken: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted_router, "PORT_TIMEOUT_S", 0.1)
    with taken:
        assert await port_again(HOST, taken.getsockname()[1]) == 0


async def test_a_first_router_takes_a_free_port() -> None:
    assert await port_again(HOST, 0) == 0
