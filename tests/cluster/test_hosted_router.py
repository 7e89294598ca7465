"""What a router tells its controller."""

import asyncio
from pathlib import Path

from router_deployment import router_deployment

from paceline.cluster.hosted import HostContext
from paceline.cluster.hosted_router import HostedRouter
from paceline.cluster.process_state import ProcessName, Role
from paceline.cluster.settings import DeploymentSettings


async def test_a_router_reports_its_lag(tmp_path: Path) -> None:
    context = HostContext(
        name=ProcessName(Role.ROUTER, 0, 1),
        settings=DeploymentSettings.model_validate({"model": {"path": "x"}}),
        host="127.0.0.1",
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
