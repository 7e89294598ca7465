"""A hosted process without a model, for tests with a real Ray. What it does is in model.path."""

import importlib.util
import os
from pathlib import Path

import grpc

from paceline.cluster.hosted import HostContext, HostedLoad
from paceline.cluster.launcher import Membership
from paceline.errors import ConfigError

OUTSIDERS = ("router", "kernels", "cluster", "proto")
"""Folders at the root of a checkout, which nobody may import by these names."""


class FakeHosted:
    """Idle, unless the folder named by model.path has a file `busy`, `fail` or `crash`."""

    def __init__(self, context: HostContext) -> None:
        self._context = context
        self._orders = Path(context.settings.model.path)
        self._is_draining = False
        self._num_members = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        if (self._orders / "fail").exists():
            raise ConfigError("the model folder /nowhere does not exist")
        if (self._orders / "crash").exists():
            os.abort()
        seen = [name for name in OUTSIDERS if importlib.util.find_spec(name) is not None]
        self._context.on_step(f"outsiders: {seen}", 0.0)
        spec = importlib.util.find_spec("paceline.engine")
        self._context.on_step(f"engine: {spec is not None}", 0.0)
        self._context.on_step(f"gpus: {os.environ['CUDA_VISIBLE_DEVICES']}", 0.0)
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        port = self._server.add_insecure_port(f"{self._context.host}:{self._context.router_port}")
        await self._server.start()
        return f"{self._context.host}:{port}"

    def load(self) -> HostedLoad:
        busy = (self._orders / "busy").exists()
        return HostedLoad(
            draining=self._is_draining,
            is_idle=not busy,
            num_running=int(busy),
            num_blocks=10,
            num_free_blocks=self._num_members,  # so that a test sees it
            model_name="fake",
        )

    async def update_membership(self, membership: Membership) -> None:
        self._num_members = len(membership.members)

    async def drain(self) -> None:
        self._is_draining = True

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    async def check_integrity(self) -> None:
        """Nothing to check."""

    def arm_failpoint(self, specification: str) -> None:
        """No failpoints."""


def build_fake(context: HostContext) -> FakeHosted:
    return FakeHosted(context)
