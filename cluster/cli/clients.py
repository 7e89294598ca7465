"""Stubs of a running deployment's APIs; gRPC's errors come out as ours."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import grpc

from paceline.cluster.deployment_record import DeploymentRecord, find
from paceline.errors import PacelineError, UnavailableError
from paceline.grpc_options import CLIENT_CHANNEL
from paceline.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc

CALL_TIMEOUT_S = 10.0


class Control(NamedTuple):
    """The control API of a deployment."""

    record: DeploymentRecord
    stub: control_pb2_grpc.ControlServiceStub

    def status(self) -> control_pb2.GetStatusResponse:
        with translated(f"the control API of {self.record.deployment}"):
            return self.stub.GetStatus(control_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)


@contextlib.contextmanager
def control(deployment: str | None) -> Iterator[Control]:
    """Connect to the controller of a deployment that is up on this machine."""
    record = find(deployment)
    if not record.is_up:
        raise UnavailableError(
            f"the deployment {record.deployment} is not up yet, or its start was cut off. Wait, or "
            f"clean up: paceline down --deployment {record.deployment}"
        )
    with grpc.insecure_channel(record.controller_address, options=CLIENT_CHANNEL) as channel:
        yield Control(record, control_pb2_grpc.ControlServiceStub(channel))


@contextlib.contextmanager
def inference(deployment: str | None) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    """Connect to a router of a deployment that is up on this machine."""
    with grpc.insecure_channel(router_address(deployment), options=CLIENT_CHANNEL) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def router_address(deployment: str | None) -> str:
    """Ask the controller for a router that is READY."""
    with control(deployment) as api:
        for process in api.status().processes:
            if process.role == "router" and process.state == control_pb2.PROCESS_STATE_READY:
                return process.address
        raise UnavailableError(
            f"no router of {api.record.deployment} is READY now; see paceline status"
        )


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise gRPC's errors as PacelineError with the server's own words."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else None
        details = (error.details() if isinstance(error, grpc.Call) else None) or str(error)
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise UnavailableError(f"{what} does not answer: {details}") from None
        raise PacelineError(details) from None
