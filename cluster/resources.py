"""Refuse sizes that the cluster cannot hold, with the numbers."""

import math
from collections.abc import Mapping

from paceline.cluster.devices import GPU, advised_utilization, worker_resources
from paceline.cluster.launcher import Capacity
from paceline.cluster.process_state import Role
from paceline.cluster.settings import DeploymentSettings
from paceline.errors import CapacityError
from paceline.worker.settings import WorkerSettings

WORKER_OVERHEAD_BYTES = 600 << 20
"""Resident memory of a CPU worker beside KV pool and weights: Python, torch and Ray, measured."""
GPU_WORKER_OVERHEAD_BYTES = 2560 << 20
"""Host memory of a worker on a GPU, CUDA's libraries and kernels included: an estimate."""
MAX_WORKERS = 10_000
"""Of one pool. Above it somebody has mistyped, and Ray would try for hours."""
MAX_ADVISED_SHARING = 4
"""Workers a GPU: with more, each would have little memory left beside its own weights."""


def pool_settings(settings: DeploymentSettings, role: Role) -> WorkerSettings:
    return settings.prefill if role is Role.PREFILL else settings.decode


def check_capacity(
    settings: DeploymentSettings,
    wanted: Mapping[Role, int],
    num_more: Mapping[Role, int],
    capacity: Capacity,
) -> None:
    """Raise CapacityError if the pools cannot have these sizes.

    Resources are compared with all that the cluster has; memory, for what is still to be started
    (`num_more`), with what is free on this machine, when it is the only one.
    """
    for role, count in wanted.items():
        if count > MAX_WORKERS:
            raise CapacityError(
                f"{role.value} would have {count} workers, and a pool has {MAX_WORKERS} at most. "
                "Ask for fewer"
            )
    _check_resources(settings, wanted, capacity)
    if capacity.num_nodes == 1:
        _check_memory(settings, num_more, capacity)


def _check_resources(
    settings: DeploymentSettings, wanted: Mapping[Role, int], capacity: Capacity
) -> None:
    each = {
        role: worker_resources(pool_settings(settings, role))
        for role, count in wanted.items()
        if count > 0 and role.is_worker
    }
    for name in sorted({name for resources in each.values() for name in resources}):
        has = capacity.resources.get(name, 0.0)
        shares = {role: r[name] for role, r in each.items() if r.get(name)}
        needs = round(sum(wanted[role] * share for role, share in shares.items()), 4)  # as Ray does
        if needs > has:
            parts = " + ".join(
                f"{wanted[role]} {role.value} × {share:g}" for role, share in shares.items()
            )
            if name == GPU:
                advice = _gpu_advice({role: wanted[role] for role in shares}, int(has))
            else:
                advice = f"Ask for fewer workers, lower their resources.{name}, or add nodes"
            raise CapacityError(
                f"the pools would need {needs:g} {name} ({parts}), and the Ray cluster has "
                f"{has:g}. {advice}"
            )


def _gpu_advice(num_workers: Mapping[Role, int], num_gpus: int) -> str:
    if num_gpus == 0:
        return (
            "Ray counts the GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows where it is "
            "started. Add nodes with GPUs, or set device to cpu"
        )
    sharing = math.ceil(sum(num_workers.values()) / num_gpus)
    if sharing > MAX_ADVISED_SHARING:
        return "Ask for fewer workers, or add nodes"
    share = math.floor(100 / sharing) / 100
    names = " and ".join(f"{role.value}.resources.GPU" for role in num_workers)
    return (
        f"Set {names} to {share:g} and gpu_memory_utilization to {advised_utilization(share)} to "
        "share, ask for fewer workers, or add nodes"
    )


def worker_bytes(settings: WorkerSettings) -> int:
    """Estimate the host memory that one more worker takes.

    On a CPU its weights are mapped from a file that all share, and its pool is in this memory.
    """
    if settings.device == "cuda":
        return GPU_WORKER_OVERHEAD_BYTES
    if settings.num_kv_blocks is not None:
        return WORKER_OVERHEAD_BYTES  # what a block takes is known when the model is loaded
    return WORKER_OVERHEAD_BYTES + settings.cpu_kv_cache_bytes


def _check_memory(
    settings: DeploymentSettings, num_more: Mapping[Role, int], capacity: Capacity
) -> None:
    more = {role: count for role, count in num_more.items() if count > 0 and role.is_worker}
    each = {role: worker_bytes(pool_settings(settings, role)) for role in more}
    needs = sum(count * each[role] for role, count in more.items())
    if needs <= capacity.memory_available_bytes:
        return
    parts = " + ".join(f"{count} {role.value} × {_gib(each[role])}" for role, count in more.items())
    pools = {role: pool_settings(settings, role) for role in more}
    lower = " or ".join(
        f"{role.value}.kv_cache_bytes ({_gib(pool.cpu_kv_cache_bytes)})"
        for role, pool in pools.items()
        if pool.device == "cpu" and pool.num_kv_blocks is None
    )
    raise CapacityError(
        f"the workers to be started would need about {_gib(needs)} of memory ({parts}), and "
        f"{_gib(capacity.memory_available_bytes)} of {_gib(capacity.memory_total_bytes)} are free "
        f"on this machine. Ask for fewer workers{f', or lower {lower}' if lower else ''}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
