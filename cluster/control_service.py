"""The control API: translate between `paceline.v1.ControlService` and the controller."""

import logging
import time
from typing import NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from paceline.cluster.controller import Controller
from paceline.cluster.process_state import ProcessState, Role
from paceline.cluster.resources import pool_settings
from paceline.cluster.settings import DeploymentSettings
from paceline.cluster.supervised import Supervised
from paceline.errors import ConfigError, PacelineError
from paceline.grpc_server import make_server
from paceline.router.grpc_status import to_status
from paceline.v1 import control_pb2, control_pb2_grpc

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 1 << 16
"""The control API's requests are names and numbers of workers."""
SERVICE_NAME = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
_STATES = {
    ProcessState.STARTING: control_pb2.PROCESS_STATE_STARTING,
    ProcessState.READY: control_pb2.PROCESS_STATE_READY,
    ProcessState.DRAINING: control_pb2.PROCESS_STATE_DRAINING,
    ProcessState.STOPPING: control_pb2.PROCESS_STATE_DRAINING,
    ProcessState.DEAD: control_pb2.PROCESS_STATE_DEAD,
}
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
_Context: TypeAlias = "grpc.aio.ServicerContext[Request, Response]"


class ControlServicer(control_pb2_grpc.ControlServiceServicer):
    """Serve `paceline.v1.ControlService` on the controller's event loop."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def GetStatus(
        self,
        request: control_pb2.GetStatusRequest,
        context: "_Context[control_pb2.GetStatusRequest, control_pb2.GetStatusResponse]",
    ) -> control_pb2.GetStatusResponse:
        controller = self._controller
        return control_pb2.GetStatusResponse(
            deployment=controller.settings.deployment,
            model=controller.model_name,
            processes=[_process(p, controller.settings) for p in controller.processes],
            pools=_pools(controller),
            events=[
                control_pb2.Event(time_s=e.time_s, message=e.message) for e in controller.events
            ],
            uptime_s=time.monotonic() - controller.started_s,
            problem=controller.problem,
        )

    async def Scale(
        self,
        request: control_pb2.ScaleRequest,
        context: "_Context[control_pb2.ScaleRequest, control_pb2.ScaleResponse]",
    ) -> control_pb2.ScaleResponse:
        try:
            await self._controller.scale(dict(request.pools))
        except PacelineError as error:
            await _abort(context, error)
        return control_pb2.ScaleResponse(pools=_pools(self._controller))

    async def Drain(
        self,
        request: control_pb2.DrainRequest,
        context: "_Context[control_pb2.DrainRequest, control_pb2.DrainResponse]",
    ) -> control_pb2.DrainResponse:
        try:
            await self._controller.drain(request.worker_id)
        except PacelineError as error:
            await _abort(context, error)
        return control_pb2.DrainResponse()


class ControlServer:
    """The controller's gRPC server, with health and reflection."""

    def __init__(self, servicer: ControlServicer) -> None:
        self._health = health.aio.HealthServicer()
        self._server = make_server(MAX_REQUEST_BYTES)
        control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port. Raises ConfigError if it is in use."""
        try:
            bound = self._server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            raise ConfigError(
                f"the controller cannot listen on {host}:{port}: the port is in use. Stop what "
                "uses it, or change controller.grpc_port (0 takes a free one) or controller.host"
            ) from None
        await self._server.start()
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return bound

    async def stop(self) -> None:
        await self._server.stop(grace=None)


async def _abort(context: "_Context[Request, Response]", error: PacelineError) -> NoReturn:
    await context.abort_with_status(to_status(error))
    raise AssertionError("abort raises")


def _pools(controller: Controller) -> list[control_pb2.Pool]:
    return [
        control_pb2.Pool(
            name=role.value,
            wanted=controller.wanted[role],
            ready=sum(
                p.name.role is role and p.state is ProcessState.READY for p in controller.processes
            ),
        )
        for role in (Role.PREFILL, Role.DECODE)
    ]


def _process(process: Supervised, settings: DeploymentSettings) -> control_pb2.Process:
    role = process.name.role
    message = control_pb2.Process(
        worker_id=process.name.worker_id,
        role=role.value,
        device=pool_settings(settings, role).device if role.is_worker else "",
        incarnation=process.name.incarnation,
        state=_STATES[process.state],
        address=process.address,
        startup=[
            control_pb2.StartupStep(name=step.name, seconds=step.seconds) for step in process.steps
        ],
        message=process.message,
    )
    report = process.report
    if report is not None:
        message.pid = report.pid
        message.memory_bytes = report.memory_bytes
        message.num_blocks = report.num_blocks
        message.num_free_blocks = report.num_free_blocks
        message.num_running = report.num_running
        message.num_waiting = report.num_waiting
        message.lag_s = report.lag_s
        message.max_lag_s = report.max_lag_s
        if report.loading is not None and not message.message:
            message.message = f"{report.loading.step}: {report.loading.fraction:.0%}"
    return message
