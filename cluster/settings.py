"""The one tree of settings: what a deployment's YAML file may say.

Each package has its own part; this composes them and checks what no part can check alone.
"""

from collections.abc import Callable, Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from paceline.addresses import parse_address
from paceline.cluster.devices import device_problems, mixed_devices_problem
from paceline.decode_worker.settings import DecodeSettings
from paceline.engine.settings import ModelSettings
from paceline.kv_transfer.settings import KvSettings
from paceline.prefill_worker.settings import PrefillSettings
from paceline.router.settings import RouterSettings

MAX_NAME_LENGTH = 32


class RaySettings(BaseModel):
    """Which Ray cluster holds the processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = Field(
        default=None,
        min_length=1,
        description="host:port of a running Ray cluster to join. Default: `up` starts one of its "
        "own on this machine, reachable by loopback only, and `down` stops it.",
    )
    object_store_bytes: int = Field(
        default=80_000_000,
        ge=78_643_200,
        description="Size of the object store when Ray is started here; Ray's least, because no "
        "token and no KV byte goes through it.",
    )
    start_timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds that starting or joining Ray may take."
    )
    head_outage_s: int = Field(
        default=3600,
        ge=1,
        description="Seconds that workers go on serving while the head of a Ray started here is "
        "away.",
    )

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        if address is not None:
            try:
                parse_address(address)
            except ValueError as error:
                raise ValueError(f"ray.address: {error}") from None
        return address


class ControllerSettings(BaseModel):
    """How the controller watches and replaces processes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address that the control API listens on; there is no authentication yet, so "
        "the default is not reachable from other machines.",
    )
    grpc_port: int = Field(
        default=0, ge=0, le=65535, description="TCP port of the control API; 0 takes a free one."
    )
    poll_interval_s: float = Field(
        default=0.5,
        gt=0,
        le=60,
        description="Seconds between two looks at a process. A death is noticed at once, without "
        "it.",
    )
    start_timeout_s: float = Field(
        default=900.0,
        gt=0,
        description="Seconds from a worker's start to READY, loading and converting included.",
    )
    drain_timeout_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds that running requests get to finish before a drained worker is "
        "stopped; what still runs then goes on at another worker.",
    )
    worker_silence_limit_s: float = Field(
        default=15.0,
        gt=0,
        description="A worker that has not answered the controller for this many seconds, or has "
        "stalled for as long (see progress_timeout_s of its pool), is killed and replaced. Its "
        "work has gone elsewhere long before.",
    )
    router_silence_limit_s: float = Field(
        default=60.0,
        gt=0,
        description="A router that has not answered the controller for this many seconds is "
        "killed and replaced, and its streams end.",
    )
    first_back_off_s: float = Field(
        default=1.0,
        gt=0,
        description="Seconds before the third start in a row of a worker that does not stay up; "
        "the second start comes at once, each further wait is doubled.",
    )
    max_back_off_s: float = Field(
        default=30.0, gt=0, description="Longest of these waits, in seconds."
    )
    max_empty_back_off_s: float = Field(
        default=2.0,
        gt=0,
        description="Longest of these waits in seconds while the pool has no other worker: nobody "
        "can be served then, so trying is worth its cost.",
    )
    stable_after_s: float = Field(
        default=30.0, gt=0, description="Seconds after READY that end a row of failures."
    )


class DeploymentSettings(BaseModel):
    """A deployment: one model, its router, its two pools, and where they run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deployment: str = Field(
        default="local",
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        max_length=MAX_NAME_LENGTH,
        description="Name, which tells deployments on one machine or Ray cluster apart: lower-case "
        "letters, digits and inner hyphens.",
    )
    model: ModelSettings = Field(description="What is served.")
    router: RouterSettings = Field(default_factory=RouterSettings, description="The public APIs.")
    prefill: PrefillSettings = Field(
        default_factory=PrefillSettings, description="The workers that compute prompts."
    )
    decode: DecodeSettings = Field(
        default_factory=DecodeSettings, description="The workers that stream tokens."
    )
    kv: KvSettings = Field(default_factory=KvSettings, description="KV blocks and how they move.")
    ray: RaySettings = Field(default_factory=RaySettings, description="Where processes run.")
    controller: ControllerSettings = Field(
        default_factory=ControllerSettings, description="How processes are watched."
    )

    @model_validator(mode="after")
    def _check_across(self) -> Self:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self


def prefill_size_problem(settings: DeploymentSettings, num_prefill: int) -> str | None:
    """Say why a deployment cannot serve with this many prefill workers, if it cannot."""
    decode = settings.decode
    if num_prefill > 0 or decode.local_prefill_tokens == "unlimited":
        return mixed_devices_problem(settings, num_prefill)
    return (
        f"prefill has 0 workers and decode.local_prefill_tokens is {decode.local_prefill_tokens}, "
        "so nobody could compute prompts; set decode.local_prefill_tokens to unlimited, or keep at "
        "least 1 prefill worker"
    )


def _problems(settings: DeploymentSettings) -> Iterator[str]:
    if settings.decode.replicas == 0:
        yield "decode.replicas is 0, so nobody could stream tokens; it must be at least 1"
    problem = prefill_size_problem(settings, settings.prefill.replicas)
    if problem is not None:
        yield problem
    yield from device_problems(settings)
    if settings.router.replicas > 1 and settings.router.grpc_port != 0:
        yield (
            f"router.replicas is {settings.router.replicas} and router.grpc_port is "
            f"{settings.router.grpc_port}, which only one router of a machine can have; set "
            "router.grpc_port to 0, or router.replicas to 1"
        )
    if settings.router.grpc_port and settings.router.grpc_port == settings.controller.grpc_port:
        yield (
            f"router.grpc_port and controller.grpc_port are both {settings.router.grpc_port}; they "
            "must differ"
        )


def walk(tree: BaseModel, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield (key path, value) of every setting, in the order of declaration."""
    for name in type(tree).model_fields:
        value = getattr(tree, name)
        key = f"{path}.{name}" if path else name
        if isinstance(value, BaseModel):
            yield from walk(value, key)
        else:
            yield key, value


def known_keys(model: type[BaseModel] = DeploymentSettings, path: str = "") -> Iterator[str]:
    """Yield the key path of every setting and section that a file may name."""
    for name, field in model.model_fields.items():
        key = f"{path}.{name}" if path else name
        yield key
        kind: object | Callable[..., object] = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, key)
