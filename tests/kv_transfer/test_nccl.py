"""What NCCL groups need of the process and the host; the rest is in test_transport_contract."""

import logging
import os

import psutil
import pytest
import torch

from paceline.errors import ConfigError
from paceline.kv_transfer.communicator import describe
from paceline.kv_transfer.listen_host import interface_of
from paceline.kv_transfer.nccl import (
    NcclGroups,
    _loaded_version,
    prepare_environment,
    warn_if_workers_cannot_share_a_gpu,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that names nothing of NCCL's, given back after the test."""
    for name in (
        "NCCL_SOCKET_IFNAME",
        "NCCL_MULTI_RANK_GPU_ENABLE",
        "NCCL_RAS_ENABLE",
        "TORCH_NCCL_BLOCKING_WAIT",
        "TORCH_NCCL_TRACE_BUFFER_SIZE",
        "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_nccl_takes_the_interface_of_the_listen_host(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    prepare_environment("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    assert "interface==lo source=kv.listen_host" in caplog.text


def test_an_interface_that_the_user_names_stays(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    environment.setenv("NCCL_SOCKET_IFNAME", "ib0")
    prepare_environment("127.0.0.1")
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert "interface=ib0 source=NCCL_SOCKET_IFNAME" in caplog.text


def test_a_watchdog_that_would_end_the_process_is_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    with pytest.raises(ConfigError, match="would end this worker when a peer"):
        prepare_environment("127.0.0.1")


def test_every_address_of_this_host_has_its_interface() -> None:
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family.name == "AF_INET":
                assert interface_of(entry.address) == name
    assert interface_of("127.0.0.9") == interface_of("127.0.0.1")
    assert interface_of("203.0.113.7") is None


@pytest.mark.skipif(torch.distributed.is_nccl_available(), reason="this torch has NCCL")
def test_a_torch_without_nccl_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no NCCL"):
        NcclGroups(torch.device("cuda", 0), 4096, "127.0.0.1", 1.0)


@pytest.mark.parametrize(
    ("setting", "version", "is_warned"),
    [
        ("1", (2, 29, 7), True),
        ("1", (2, 28), True),
        ("1", (2, 30, 0), False),
        ("1", (3, 0, 1), False),
        ("0", (2, 28, 9), False),
        (None, (2, 28, 9), False),
    ],
)
def test_an_nccl_too_old_for_two_workers_on_one_gpu_is_told_at_start(
    environment: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    setting: str | None,
    version: tuple[int, ...],
    is_warned: bool,
) -> None:
    if setting is not None:
        environment.setenv("NCCL_MULTI_RANK_GPU_ENABLE", setting)
    warn_if_workers_cannot_share_a_gpu(version)
    assert ("two workers on one GPU cannot exchange KV" in caplog.text) == is_warned


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_version_that_is_loaded_is_three_numbers() -> None:
    version = _loaded_version()
    assert len(version) == 3
    assert version >= (2, 20, 0)


def test_an_error_is_told_in_one_line_without_paths_of_sources() -> None:
    error = RuntimeError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage, "
        "NCCL version 2.28.9\nncclInvalidUsage: This usually reflects invalid usage.\n"
        "Last error:\nDuplicate GPU detected"
    )
    assert describe(error) == (
        "NCCL error: invalid usage, NCCL version 2.28.9 ncclInvalidUsage: This usually reflects "
        "invalid usage. Last error: Duplicate GPU detected"
    )
