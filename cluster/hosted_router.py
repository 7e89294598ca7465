"""A router inside a Ray actor's process."""

import asyncio
import logging
import time

from paceline.cluster.early_checks import check_port
from paceline.cluster.hosted import HostContext, HostedLoad
from paceline.cluster.launcher import Membership
from paceline.cluster.model_cache import model_cache_dir
from paceline.engine.model_config import read_model_config
from paceline.engine.model_source import prepare_model
from paceline.errors import ConfigError
from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.worker_view import Role as PoolRole
from paceline.router.worker_view import WorkerMember

logger = logging.getLogger(__name__)

PORT_TIMEOUT_S = 10.0
"""For the port of the router before this one to be free again; another one is taken then."""
PORT_POLL_S = 0.1


class HostedRouter:
    """Runs the router on the loop that calls it."""

    def __init__(self, context: HostContext) -> None:
        self._context = context
        self._router: Router | None = None
        self._model_name = ""

    async def start(self) -> str:
        context = self._context
        started = time.monotonic()
        model = await asyncio.to_thread(self._prepare)
        context.on_step("prepare the model", time.monotonic() - started)
        started = time.monotonic()
        settings = context.settings.router
        if settings.grpc_port == 0:
            port = await port_again(settings.host, context.router_port)
            settings = settings.model_copy(update={"grpc_port": port})
        router = Router(
            settings,
            model,
            router_id=context.name.worker_id,
            incarnation=context.name.incarnation,
        )
        await router.warm_up()
        context.on_step("start the tokenizers", time.monotonic() - started)
        started = time.monotonic()
        await router.start()
        context.on_step("listen", time.monotonic() - started)
        self._router = router
        self._model_name = model.name
        return router.address

    def load(self) -> HostedLoad:
        if self._router is None:
            return HostedLoad()
        status = self._router.status()
        return HostedLoad(
            is_idle=status.num_running == 0 and status.num_waiting == 0,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            lag_s=status.lag.mean_s,
            max_lag_s=status.lag.max_s,
            model_name=self._model_name,
        )

    async def update_membership(self, membership: Membership) -> None:
        if self._router is not None:
            await self._router.update_membership(
                membership.version,
                [
                    WorkerMember(m.worker_id, PoolRole(m.role.value), m.incarnation, m.address)
                    for m in membership.members
                ],
            )

    async def drain(self) -> None:
        """Routers are not drained: `stop` lets their streams go on for router.drain_timeout_s."""

    async def stop(self) -> None:
        if self._router is not None:
            await self._router.stop()

    async def check_integrity(self) -> None:
        """Routers own no KV."""

    def arm_failpoint(self, specification: str) -> None:
        raise ConfigError(f"routers have no failpoints, and were told to arm {specification}")

    def _prepare(self) -> ServedModel:
        folder = prepare_model(
            self._context.settings.model, model_cache_dir(), self._context.on_progress
        )
        config = read_model_config(folder.path)
        limit = self._context.settings.model.max_model_len
        return ServedModel(
            name=folder.name,
            max_model_len=limit or config.max_position_embeddings,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            tokenizer_folder=folder.path,
        )


async def port_again(host: str, port: int) -> int:
    """Return the port once it is free, 0 if it does not become so in time.

    Ports that Linux gives out can be taken by anybody's connection while no router listens there.
    """
    deadline = time.monotonic() + PORT_TIMEOUT_S
    while check_port("router.grpc_port", host, port).problem:
        if time.monotonic() > deadline:
            logger.warning("event=port_lost port=%d after_s=%g", port, PORT_TIMEOUT_S)
            return 0
        await asyncio.sleep(PORT_POLL_S)
    return port
