"""A router process: its gRPC server, its links to workers, and its timer, on one event loop."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from paceline.errors import ConfigError, UnavailableError
from paceline.grpc_server import make_server
from paceline.internal.v1 import worker_pb2
from paceline.request import AttemptKey, Work
from paceline.router.dispatch import Dispatcher
from paceline.router.free_memory import return_memory_for_ever
from paceline.router.generation import Generations
from paceline.router.grpc_api import InferenceServicer
from paceline.router.lag import Lag, LoopLag, watch_loop
from paceline.router.message_size import default_request_bytes
from paceline.router.model import ServedModel
from paceline.router.prompt_encoder import PromptEncoder
from paceline.router.settings import RouterSettings
from paceline.router.worker_link import WorkerLink
from paceline.router.worker_messages import WorkerClaim
from paceline.router.worker_view import WorkerMember
from paceline.silence import Company
from paceline.v1 import inference_pb2, inference_pb2_grpc
from paceline.wire import work_to_proto

logger = logging.getLogger(__name__)

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """One worker as this router sees it."""

    member: WorkerMember
    is_connected: bool
    is_draining: bool
    num_free_blocks: int
    num_running: int
    message: str
    """Why it is not connected; empty if it is."""


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """What a router is doing."""

    router_id: str
    incarnation: int
    address: str
    """host:port of the gRPC API"""
    membership_version: int
    num_waiting: int
    num_running: int
    """Requests that have been dispatched and have not ended"""
    lag: Lag
    can_serve: bool
    """Whether connected workers can compute and decode a prompt"""
    workers: tuple[LinkStatus, ...]


class _LinkCommands:
    """The dispatcher's commands, as messages on the links."""

    def __init__(self, links: dict[str, WorkerLink]) -> None:
        self._links = links

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        message = worker_pb2.Prefill(work=work_to_proto(work), reader=_address(reader))
        self._send(worker_id, worker_pb2.SessionRequest(prefill=message))

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        message = worker_pb2.Admit(
            work=work_to_proto(work), source=None if source is None else _address(source)
        )
        self._send(worker_id, worker_pb2.SessionRequest(admit=message))

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        message = worker_pb2.Cancel(request_id=key.request_id, attempt=key.attempt, choices=choices)
        self._send(worker_id, worker_pb2.SessionRequest(cancel=message))

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        message = worker_pb2.Claim(
            num_blocks=claim.num_blocks,
            num_sequences=claim.num_sequences,
            waited_ms=round(claim.waited_s * 1000),
            holds=claim.holds,
        )
        self._send(worker_id, worker_pb2.SessionRequest(claim=message))

    def _send(self, worker_id: str, message: worker_pb2.SessionRequest) -> None:
        link = self._links.get(worker_id)
        if link is not None:  # None: it is being removed, and its worker cancels all by itself
            link.send(message)


class Router:
    """One router. All methods must be called on one event loop."""

    def __init__(
        self,
        settings: RouterSettings,
        model: ServedModel,
        *,
        router_id: str = "router-0",
        incarnation: int = 1,
    ) -> None:
        self.router_id = router_id
        self.incarnation = incarnation
        self._settings = settings
        self._links: dict[str, WorkerLink] = {}
        self._company = Company()
        self._lag = LoopLag()
        self._membership_version = 0
        self._membership_lock = asyncio.Lock()
        self._dispatcher = Dispatcher(settings, _LinkCommands(self._links), self._on_change)
        self._max_request_bytes = settings.max_request_bytes or default_request_bytes(
            model.max_model_len
        )
        self._encoder = PromptEncoder(model.tokenizer_folder, settings, model.max_model_len)
        self._generations = Generations(
            name_prefix=f"{router_id}.{incarnation:x}",
            router_id=router_id,
            model=model,
            settings=settings,
            encoder=self._encoder,
            dispatcher=self._dispatcher,
            lag=self._lag,
            on_change=self._on_change,
        )
        self._health = health.aio.HealthServicer()
        self._is_serving: bool | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._health_task: asyncio.Task[None] | None = None
        self._memory_task: asyncio.Task[None] | None = None
        self._lag_task: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """host:port of the gRPC API; empty before `start`."""
        return self._address

    async def warm_up(self) -> None:
        """Start the tokenizer's processes, so that no request has to wait for one."""
        await self._encoder.start()

    async def start(self) -> None:
        """Listen; raises ConfigError if the port is taken."""
        settings = self._settings
        server = make_server(self._max_request_bytes)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceServicer(self._generations, settings.client_read_timeout_s), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        wanted = f"{settings.host}:{settings.grpc_port}"
        try:
            port = server.add_insecure_port(wanted)
        except RuntimeError as error:
            await server.stop(None)
            raise ConfigError(
                f"the router cannot listen on {wanted}: {error}. Stop what uses the port, or "
                "change router.grpc_port (0 takes a free one) or router.host"
            ) from error
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        self._server = server
        self._memory_task = asyncio.create_task(return_memory_for_ever(), name="return memory")
        self._lag_task = asyncio.create_task(watch_loop(self._lag), name="watch the loop")
        self._address = f"{settings.host}:{port}"
        self._on_change()
        logger.info(
            "router_listening router_id=%s incarnation=%d address=%s",
            self.router_id,
            self.incarnation,
            self._address,
        )

    async def stop(self) -> None:
        """Refuse new requests, let running ones go on for `router.drain_timeout_s`, then end
        them."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(self._settings.drain_timeout_s)
        for request in list(self._dispatcher.requests.values()):
            error = UnavailableError(f"{self.router_id} is stopping; send the request to another")
            self._dispatcher.fail(request, error, _now())
        await asyncio.gather(*(link.stop() for link in self._links.values()))
        self._links.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._health_task is not None:
            await self._health_task
        for task in (self._memory_task, self._lag_task):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._encoder.close()

    async def update_membership(self, version: int, workers: Sequence[WorkerMember]) -> None:
        """Connect to these workers and to no others. A version that is not newer changes
        nothing."""
        async with self._membership_lock:
            if version <= self._membership_version:
                return
            self._membership_version = version
            wanted = {worker.worker_id: worker for worker in workers}
            gone = [
                link
                for worker_id, link in self._links.items()
                if wanted.get(worker_id) != link.member
            ]
            for link in gone:
                del self._links[link.member.worker_id]
            await asyncio.gather(*(link.stop() for link in gone))
            for worker_id, member in wanted.items():
                if worker_id not in self._links:
                    self._connect(member)

    def status(self) -> RouterStatus:
        dispatcher = self._dispatcher
        return RouterStatus(
            self.router_id,
            self.incarnation,
            self._address,
            self._membership_version,
            dispatcher.num_waiting,
            sum(bool(request.attempts) for request in dispatcher.requests.values()),
            self._lag.lag(_now()),
            dispatcher.placement.can_serve,
            tuple(self._link_status(link) for link in self._links.values()),
        )

    def _connect(self, member: WorkerMember) -> None:
        link = WorkerLink(
            member,
            router_id=self.router_id,
            router_incarnation=self.incarnation,
            settings=self._settings,
            dispatcher=self._dispatcher,
            company=self._company,
            lag=self._lag,
            clock=_now,
            on_change=self._on_change,
        )
        self._links[member.worker_id] = link
        link.start()

    def _link_status(self, link: WorkerLink) -> LinkStatus:
        view = self._dispatcher.placement.workers.get(link.member.worker_id)
        if view is None:
            message = link.last_error or "connecting"
            return LinkStatus(link.member, False, False, 0, 0, message)
        load = view.load
        return LinkStatus(
            link.member, True, load.draining, load.num_free_blocks, load.num_running, ""
        )

    def _on_change(self) -> None:
        """Set the timer for the next backoff's end, and health; called after rare events."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        when_s = self._dispatcher.next_timer_s(_now())
        if when_s is not None:
            self._timer = asyncio.get_running_loop().call_at(when_s, self._on_timer)
        can_serve = self._dispatcher.placement.can_serve
        if can_serve != self._is_serving and self._server is not None:
            self._is_serving = can_serve
            self._health_task = asyncio.create_task(self._set_health(self._health_task))

    def _on_timer(self) -> None:
        self._timer = None
        self._dispatcher.dispatch(_now())
        self._on_change()

    async def _set_health(self, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await earlier
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if self._dispatcher.placement.can_serve
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await self._health.set(SERVICE_NAME, status)


def _now() -> float:
    return time.monotonic()  # asyncio's clock, on any thread


def _address(member: WorkerMember) -> worker_pb2.WorkerAddress:
    return worker_pb2.WorkerAddress(
        worker_id=member.worker_id, incarnation=member.incarnation, address=member.address
    )
