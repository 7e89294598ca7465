"""Workers on GPUs: what they reserve, which settings they refuse, which GPU they see."""

from typing import Any

import pytest
from pydantic import ValidationError

from paceline.cluster.devices import prepare_environment, worker_resources
from paceline.cluster.launcher import Capacity
from paceline.cluster.process_state import Role
from paceline.cluster.resources import check_capacity
from paceline.cluster.settings import DeploymentSettings
from paceline.errors import CapacityError, ConfigError
from paceline.worker.settings import WorkerSettings

GIB = 1 << 30
ON_GPU = {"device": "cuda"}
HALF = {"device": "cuda", "resources": {"GPU": 0.5}, "gpu_memory_utilization": 0.45}
COLOCATED = {"decode": ON_GPU | {"local_prefill_tokens": "unlimited"}, "prefill": {"replicas": 0}}


def make_settings(**parts: object) -> DeploymentSettings:
    return DeploymentSettings.model_validate({"model": {"path": "x"}} | parts)


def refusal(**parts: object) -> str:
    with pytest.raises(ValidationError) as caught:
        make_settings(**parts)
    return str(caught.value)


def check(settings: DeploymentSettings, num_gpus: float, memory: int = 100 * GIB) -> None:
    wanted = {Role.PREFILL: settings.prefill.replicas, Role.DECODE: settings.decode.replicas}
    resources = {"CPU": 4.0} | ({"GPU": num_gpus} if num_gpus else {})
    check_capacity(settings, wanted, wanted, Capacity(resources, 1, memory, memory))


@pytest.mark.parametrize(
    ("given", "reserved"),
    [
        ({}, {}),
        ({"resources": {"CPU": 2}}, {"CPU": 2.0}),
        (ON_GPU, {"GPU": 1.0}),
        (ON_GPU | {"resources": {"CPU": 2}}, {"CPU": 2.0, "GPU": 1.0}),
        (HALF, {"GPU": 0.5}),
    ],
)
def test_a_worker_on_a_gpu_reserves_one_unless_told_otherwise(
    given: dict[str, Any], reserved: dict[str, float]
) -> None:
    assert worker_resources(WorkerSettings.model_validate(given)) == reserved


def test_pools_on_one_kind_of_device_are_allowed() -> None:
    make_settings(prefill=ON_GPU, decode=ON_GPU)
    make_settings(prefill=HALF, decode=HALF, model={"path": "x", "dtype": "float16"})
    make_settings(**COLOCATED, model={"path": "x", "dtype": "float16"})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            {"decode": ON_GPU},
            "prefill.device is cpu and decode.device is cuda, and KV moves between pools in",
        ),
        (
            {"model": {"path": "x", "dtype": "float16"}},
            "prefill.device is cpu, and CPUs compute float16 slowly and with overflows; set model.",
        ),
        (
            COLOCATED | {"kv": {"transport": "shm"}},
            "kv.transport is shm, which moves KV in CPU memory, and decode.device is cuda; set",
        ),
        (
            {"decode": {"resources": {"GPU": 1}}},
            "decode.resources.GPU is 1 and decode.device is cpu, so the GPU would be idle",
        ),
        (
            {"prefill": ON_GPU, "decode": ON_GPU | {"resources": {"GPU": 2}}},
            "decode.resources.GPU is 2, and a worker runs on one GPU or a share of one; it must be",
        ),
        ({"prefill": ON_GPU | {"resources": {"GPU": 0}}, "decode": ON_GPU}, "GPU is 0, and a"),
        (
            {"prefill": ON_GPU | {"resources": {"GPU": 0.5}}, "decode": HALF},
            "(prefill.resources.GPU), so those that share one would not fit; set it to at most 0.4",
        ),
    ],
)
def test_settings_that_contradict_a_device_are_refused(parts: dict[str, Any], words: str) -> None:
    assert words in refusal(**parts)


@pytest.mark.parametrize("given", [{"num_kv_blocks": 100}, {"kv_cache_bytes": GIB}])
def test_a_pool_of_a_given_size_needs_no_share_of_the_memory(given: dict[str, int]) -> None:
    half = {"device": "cuda", "resources": {"GPU": 0.5}} | given
    make_settings(prefill=half, decode=half)


def test_gpus_that_the_cluster_lacks_are_refused_with_how_to_share() -> None:
    settings = make_settings(prefill=ON_GPU, decode=ON_GPU)
    check(settings, num_gpus=2)
    with pytest.raises(CapacityError) as caught:
        check(settings, num_gpus=1)
    assert str(caught.value) == (
        "the pools would need 2 GPU (1 prefill × 1 + 1 decode × 1), and the Ray cluster has 1. Set "
        "prefill.resources.GPU and decode.resources.GPU to 0.5 and gpu_memory_utilization to 0.45 "
        "to share, ask for fewer workers, or add nodes"
    )
    check(make_settings(prefill=HALF, decode=HALF), num_gpus=1)


def test_shares_that_add_up_to_a_gpu_fit() -> None:
    tenth = {"device": "cuda", "resources": {"GPU": 0.1}, "gpu_memory_utilization": 0.09}
    settings = make_settings(prefill=tenth | {"replicas": 3}, decode=tenth | {"replicas": 7})
    check(settings, num_gpus=1)


def test_sharing_is_not_advised_for_many_workers() -> None:
    settings = make_settings(prefill=ON_GPU, decode=ON_GPU | {"replicas": 9})
    with pytest.raises(CapacityError, match=r"has 2\. Ask for fewer workers, or add nodes$"):
        check(settings, num_gpus=2)


def test_a_cluster_without_gpus_is_told_apart_from_one_with_too_few() -> None:
    with pytest.raises(CapacityError, match=r"has 0\. .* or set device to cpu$"):
        check(make_settings(**COLOCATED), num_gpus=0)


def test_workers_on_gpus_need_host_memory_for_their_processes_and_not_for_kv() -> None:
    settings = make_settings(
        prefill=HALF | {"kv_cache_bytes": 60 * GIB}, decode=HALF | {"kv_cache_bytes": 60 * GIB}
    )
    check(settings, num_gpus=1, memory=6 * GIB)
    with pytest.raises(CapacityError) as caught:
        check(settings, num_gpus=1, memory=4 * GIB)
    assert str(caught.value) == (
        "the workers to be started would need about 5.0 GiB of memory (1 prefill × 2.5 GiB + 1 "
        "decode × 2.5 GiB), and 4.0 GiB of 4.0 GiB are free on this machine. Ask for fewer workers"
    )


def test_a_cpu_pool_without_a_size_counts_as_its_default() -> None:
    with pytest.raises(CapacityError, match=r"or lower prefill\.kv_cache_bytes \(1\.0 GiB\) or "):
        check(make_settings(), num_gpus=0, memory=GIB)


@pytest.mark.parametrize("settings", [None, WorkerSettings()])
def test_a_process_without_a_gpu_sees_none(settings: WorkerSettings | None) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1"}
    prepare_environment(settings, environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize("visible", ["3", "GPU-8f6d2a1c"])
def test_a_worker_on_a_gpu_keeps_the_one_that_ray_chose(visible: str) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": visible}
    prepare_environment(WorkerSettings(device="cuda"), environment)
    assert environment["CUDA_VISIBLE_DEVICES"] == visible


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_a_worker_that_would_see_several_gpus_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must name the one GPU that Ray reserved for it"):
        prepare_environment(WorkerSettings(device="cuda"), environment)


def test_workers_that_share_a_gpu_may_meet_over_nccl_there() -> None:
    alone: dict[str, str] = {"CUDA_VISIBLE_DEVICES": "0"}
    prepare_environment(WorkerSettings.model_validate(ON_GPU), alone)
    assert "NCCL_MULTI_RANK_GPU_ENABLE" not in alone
    sharing = {"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    prepare_environment(WorkerSettings.model_validate(HALF), sharing)
    assert sharing["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert sharing["CUDA_DEVICE_MAX_CONNECTIONS"] == "8", "what the user set holds"
