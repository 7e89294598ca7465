"""Refuse sizes that the cluster cannot hold, with the numbers."""

from collections.abc import Mapping

from paceline.cluster.launcher import Capacity
from paceline.cluster.process_state import Role
from paceline.cluster.settings import DeploymentSettings
from paceline.errors import CapacityError
from paceline.worker.settings import WorkerSettings

WORKER_OVERHEAD_BYTES = 600 << 20
"""Resident memory of a CPU worker beside KV pool and weights: Python, torch and Ray, measured."""


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
    _check_resources(settings, wanted, capacity)
    if capacity.num_nodes == 1:
        _check_memory(settings, num_more, capacity)


def _check_resources(
    settings: DeploymentSettings, wanted: Mapping[Role, int], capacity: Capacity
) -> None:
    pools = [role for role in wanted if role.is_worker]
    names = {name for role in pools for name in pool_settings(settings, role).resources}
    for name in sorted(names):
        has = capacity.resources.get(name, 0.0)
        shares = {role: pool_settings(settings, role).resources.get(name, 0.0) for role in pools}
        needs = sum(wanted[role] * share for role, share in shares.items())
        if needs > has:
            parts = " + ".join(
                f"{wanted[role]} {role.value} × {share:g}"
                for role, share in shares.items()
                if share
            )
            raise CapacityError(
                f"the pools would need {needs:g} {name} ({parts}), and the Ray cluster has "
                f"{has:g}. Ask for fewer workers, lower their resources.{name}, or add nodes"
            )


def worker_bytes(settings: WorkerSettings) -> int:
    """Estimate what one more worker takes; its weights are mapped from a file that all share."""
    if settings.num_kv_blocks is not None:
        return WORKER_OVERHEAD_BYTES  # what a block takes is known when the model is loaded
    return WORKER_OVERHEAD_BYTES + settings.kv_cache_bytes


def _check_memory(
    settings: DeploymentSettings, num_more: Mapping[Role, int], capacity: Capacity
) -> None:
    more = {role: count for role, count in num_more.items() if count > 0 and role.is_worker}
    each = {role: worker_bytes(pool_settings(settings, role)) for role in more}
    needs = sum(count * each[role] for role, count in more.items())
    if needs <= capacity.memory_available_bytes:
        return
    parts = " + ".join(f"{count} {role.value} × {_gib(each[role])}" for role, count in more.items())
    advice = " or ".join(
        f"{role.value}.kv_cache_bytes ({_gib(pool_settings(settings, role).kv_cache_bytes)})"
        for role in more
    )
    raise CapacityError(
        f"the workers to be started would need {_gib(needs)} of memory ({parts}), and "
        f"{_gib(capacity.memory_available_bytes)} of {_gib(capacity.memory_total_bytes)} are free "
        f"on this machine. Ask for fewer workers, or lower {advice}"
    )


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
