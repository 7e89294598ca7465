"""What devices ask of a deployment: what Ray reserves, and which settings go together."""

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

from paceline.errors import ConfigError
from paceline.worker.settings import WorkerSettings

if TYPE_CHECKING:
    from paceline.cluster.settings import DeploymentSettings

GPU = "GPU"
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
SHARED_UTILIZATION = 0.9
"""Part of a share of a GPU that is advised for a worker: the default part of a whole one."""


def worker_resources(settings: WorkerSettings) -> dict[str, float]:
    """Return the Ray resources that one worker reserves."""
    gpu = {GPU: 1.0} if settings.device == "cuda" else {}
    return gpu | settings.resources


def mixed_devices_problem(settings: "DeploymentSettings", num_prefill: int) -> str | None:
    """Say why so many prefill workers could not hand KV to the decode workers, if they cannot."""
    prefill, decode = settings.prefill.device, settings.decode.device
    if num_prefill == 0 or prefill == decode:
        return None
    return (
        f"prefill.device is {prefill} and decode.device is {decode}, and KV moves between pools "
        "in memory of one kind only; set both to cuda or both to cpu, or have 0 prefill workers"
    )


def device_problems(settings: "DeploymentSettings") -> Iterator[str]:
    """Say what a pool's device contradicts."""
    pools: dict[str, WorkerSettings] = {"prefill": settings.prefill, "decode": settings.decode}
    for name, pool in pools.items():
        yield from _share_problems(name, pool)
    used = {name: pool for name, pool in pools.items() if pool.replicas > 0}
    on_cpu = [name for name, pool in used.items() if pool.device == "cpu"]
    on_gpu = [name for name, pool in used.items() if pool.device == "cuda"]
    if settings.model.dtype == "float16" and on_cpu:
        yield (
            f"model.dtype is float16 and {on_cpu[0]}.device is cpu, and CPUs compute float16 "
            "slowly and with overflows; set model.dtype to bfloat16 or float32"
        )
    if settings.kv.transport == "shm" and on_gpu:
        yield (
            f"kv.transport is shm, which moves KV in CPU memory, and {on_gpu[0]}.device is cuda; "
            "set kv.transport to auto"
        )


def _share_problems(name: str, pool: WorkerSettings) -> Iterator[str]:
    share = worker_resources(pool).get(GPU, 0.0)
    if pool.device != "cuda":
        if share:
            yield (
                f"{name}.resources.GPU is {share:g} and {name}.device is {pool.device}, so the GPU "
                f"would be idle; set {name}.device to cuda, or remove GPU from {name}.resources"
            )
        return
    if not 0 < share <= 1:
        yield (
            f"{name}.resources.GPU is {share:g}, and a worker runs on one GPU or a share of one; "
            "it must be more than 0 and at most 1"
        )
        return
    by_share = pool.num_kv_blocks is None and pool.kv_cache_bytes is None
    if by_share and share < 1 and pool.gpu_memory_utilization > share:
        yield (
            f"{name}.gpu_memory_utilization is {pool.gpu_memory_utilization:g} and each worker "
            f"reserves {share:g} of a GPU ({name}.resources.GPU), so those that share one would "
            f"not fit; set it to at most {advised_utilization(share)}"
        )


def advised_utilization(share: float) -> str:
    """Return the gpu_memory_utilization to advise for a share of a GPU."""
    return f"{SHARED_UTILIZATION * share:.3g}"


def prepare_environment(
    settings: WorkerSettings | None, environment: MutableMapping[str, str]
) -> None:
    """Show a process the one GPU that Ray reserved for it, or none at all (None: a router's).

    Has to come before CUDA is initialised. Raises ConfigError if it would see another number.
    """
    if settings is None or settings.device != "cuda":
        # Ray leaves the variable alone when it reserves no GPU, and whoever initialises CUDA takes
        # memory of a GPU that is another process's.
        environment[VISIBLE_DEVICES] = ""
        return
    visible = environment.get(VISIBLE_DEVICES, "")
    if not visible or "," in visible:
        raise ConfigError(
            f"{VISIBLE_DEVICES} is {visible!r} in this worker's process, and must name the one GPU "
            "that Ray reserved for it. Ray does not set it where "
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES is set: start Ray without that variable"
        )
    # Hardware queues: a transfer that waits in one must not hold up the engine's next step.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if worker_resources(settings)["GPU"] < 1:
        # NCCL refuses two ranks on one GPU otherwise; it knows this from 2.30 on.
        environment.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
