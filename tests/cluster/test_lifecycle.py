"""Deployments on a real Ray: start, death, hang, adoption, scaling, end. No model is loaded."""

import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from fake_deployment import make_settings, start
from fake_hosted import OUTSIDERS

from paceline.cluster import deployment_record, lifecycle, ray_head
from paceline.cluster.cli.clients import control
from paceline.errors import ConfigError, PacelineError, UnavailableError
from paceline.v1 import control_pb2

READY = control_pb2.PROCESS_STATE_READY


def status(name: str = "test") -> control_pb2.GetStatusResponse:
    with control(name) as api:
        return api.status()


def process(worker_id: str, name: str = "test") -> control_pb2.Process:
    (found,) = [p for p in status(name).processes if p.worker_id == worker_id]
    return found


def until(condition: Callable[[], object], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not _holds(condition):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def _holds(condition: Callable[[], object]) -> object:
    try:
        return condition()
    except (UnavailableError, ValueError):
        return False


def is_ready(worker_id: str, but_not: int = 0) -> Callable[[], bool]:
    def check() -> bool:
        found = process(worker_id)
        return found.state == READY and found.incarnation != but_not

    return check


def scale(**pools: int) -> None:
    with control("test") as api:
        api.stub.Scale(control_pb2.ScaleRequest(pools=pools), timeout=10)


def test_a_started_deployment_answers_and_its_processes_know_each_other(
    deployment: lifecycle.Deployment,
) -> None:
    response = status()
    assert [(p.worker_id, p.state) for p in response.processes] == [
        ("router-0", READY),
        ("prefill-0", READY),
        ("decode-0", READY),
    ]
    assert response.model == "fake"
    # The fakes report the size of their membership as free blocks.
    until(lambda: all(p.num_free_blocks == 2 for p in status().processes))


def test_actors_see_the_package_and_no_folder_of_the_checkout(
    deployment: lifecycle.Deployment,
) -> None:
    assert "router" in OUTSIDERS
    for found in status().processes:
        steps = [step.name for step in found.startup]
        assert steps == ["outsiders: []", "engine: True", "gpus: "]


def test_workers_that_share_a_gpu_see_it_and_the_others_see_none(
    runtime_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')  # whatever this machine has
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    half = {"device": "cuda", "resources": {"GPU": 0.5}, "gpu_memory_utilization": 0.45}
    start(make_settings(tmp_path, deployment="shared", prefill=half, decode=half))
    try:
        seen = {p.worker_id: p.startup[-1].name for p in status("shared").processes}
        assert seen == {"router-0": "gpus: ", "prefill-0": "gpus: 0", "decode-0": "gpus: 0"}
        with control("shared") as api, pytest.raises(grpc.RpcError, match=r"need 1\.5 GPU .* 1\."):
            api.stub.Scale(control_pb2.ScaleRequest(pools={"decode": 2}), timeout=10)
    finally:
        lifecycle.down("shared")


def test_every_server_listens_on_loopback_only(deployment: lifecycle.Deployment) -> None:
    assert deployment.record.ray_folder is not None
    listening = {
        connection.laddr.ip
        for found in ray_head.find_processes(deployment.record.ray_folder)
        for connection in found.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_a_killed_worker_is_noticed_at_once_and_replaced(
    deployment: lifecycle.Deployment,
) -> None:
    old = process("decode-0")
    os.kill(old.pid, signal.SIGKILL)
    began = time.monotonic()
    until(lambda: any(f"process {old.pid} ended" in e.message for e in status().events))
    assert time.monotonic() - began < 2.0
    until(is_ready("decode-0", but_not=old.incarnation))
    assert process("decode-0").incarnation > old.incarnation
    assert process("prefill-0").state == READY


def test_a_router_that_is_replaced_listens_where_it_did(
    deployment: lifecycle.Deployment,
) -> None:
    old = process("router-0")
    os.kill(old.pid, signal.SIGKILL)
    until(is_ready("router-0", but_not=old.incarnation))
    assert process("router-0").address == old.address


def test_a_worker_halted_by_a_signal_is_killed_and_replaced(
    deployment: lifecycle.Deployment,
) -> None:
    old = process("prefill-0")
    os.kill(old.pid, signal.SIGSTOP)
    until(is_ready("prefill-0", but_not=old.incarnation))
    until(lambda: not psutil.pid_exists(old.pid))
    assert any("has not answered for" in event.message for event in status().events)


def test_a_restarted_controller_adopts_what_lives_and_starts_nothing(
    deployment: lifecycle.Deployment,
) -> None:
    scale(decode=2)
    until(is_ready("decode-1"))
    before = {p.worker_id: p.pid for p in status().processes}
    uptime_s = status().uptime_s
    with lifecycle.connected(deployment.record) as controller:
        import ray

        pid = ray.get(controller.pid.remote())
        os.kill(pid, signal.SIGKILL)
        until(lambda: status().uptime_s < uptime_s)
    until(lambda: all(p.state == READY for p in status().processes))
    after = status()
    assert {p.worker_id: p.pid for p in after.processes} == before
    assert {p.name: p.wanted for p in after.pools} == {"prefill": 1, "decode": 2}
    until(lambda: all(p.num_free_blocks == 3 for p in status().processes))
    scale(decode=1)
    until(lambda: "decode-1" not in {p.worker_id for p in status().processes})
    until(lambda: not psutil.pid_exists(before["decode-1"]))


def test_a_busy_worker_drains_until_its_deadline(
    deployment: lifecycle.Deployment, orders: Path
) -> None:
    scale(decode=2)
    until(is_ready("decode-1"))
    (orders / "busy").touch()
    try:
        until(lambda: process("decode-1").num_running == 1)
        scale(decode=1)
        until(lambda: process("decode-1").state == control_pb2.PROCESS_STATE_DRAINING)
    finally:
        (orders / "busy").unlink()
    until(lambda: "decode-1" not in {p.worker_id for p in status().processes})


def test_a_second_start_of_the_same_name_is_refused(
    deployment: lifecycle.Deployment, orders: Path
) -> None:
    with pytest.raises(ConfigError, match="the deployment test is up already"):
        start(make_settings(orders))
    assert status().deployment == "test"


@pytest.fixture
def ray_address(deployment: lifecycle.Deployment, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Ray of the shared deployment as one to join, with its token where Ray looks for it."""
    assert deployment.record.ray_folder is not None
    token_path = ray_head.token_path(deployment.record.ray_folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token_path))
    monkeypatch.setenv(ray_head.LOOPBACK_VARIABLE, "0")
    return deployment.record.ray_address


def test_two_deployments_share_one_ray_and_end_alone(
    deployment: lifecycle.Deployment, ray_address: str, tmp_path: Path
) -> None:
    start(make_settings(tmp_path, deployment="second", ray={"address": ray_address}))
    assert {p.state for p in status("second").processes} == {READY}
    first, second = ({p.pid for p in status(name).processes} for name in ("test", "second"))
    assert not first & second
    lifecycle.down("second")
    until(lambda: not any(psutil.pid_exists(pid) for pid in second))
    assert {p.pid for p in status("test").processes} == first


@pytest.fixture
def shell_of_another_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who works with other Ray clusters: a token at home, and variables in the shell."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of another Ray", encoding="ascii")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of yet another Ray")
    monkeypatch.setenv("RAY_NAMESPACE", "elsewhere")
    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "no.such.hook")


@pytest.mark.usefixtures("shell_of_another_ray")
def test_two_deployments_with_a_ray_each_do_not_meet(
    deployment: lifecycle.Deployment, tmp_path: Path
) -> None:
    environment = dict(os.environ)
    started = start(make_settings(tmp_path, deployment="other"))
    assert dict(os.environ) == environment
    assert started.record.ray_folder is not None
    folder = started.record.ray_folder
    assert stat.S_IMODE(ray_head.token_path(folder).stat().st_mode) == 0o600
    assert {p.state for p in status("other").processes} == {READY}
    lifecycle.down("other")
    assert ray_head.find_processes(folder) == []
    assert not folder.exists()
    assert {p.state for p in status("test").processes} == {READY}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"},
    ],
    ids=["no-token", "wrong-token", "no-file"],
)
def test_a_ray_cluster_that_wants_another_token_is_refused_with_the_variables_to_set(
    deployment: lifecycle.Deployment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(ray_head.LOOPBACK_VARIABLE, "0")
    address = deployment.record.ray_address
    settings = make_settings(tmp_path, deployment="bad", ray={"address": address})
    with pytest.raises(ConfigError, match=r"wants a token.*RAY_AUTH_TOKEN,.*~/\.ray/auth_token"):
        start(settings)
    with pytest.raises(ConfigError, match="bad is not up"):
        deployment_record.find("bad")


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ("fail", "did not start: the model folder /nowhere does not exist"),
        ("crash", r"did not start: its process \d+ ended"),
    ],
)
def test_a_failed_start_shows_the_cause_and_leaves_nothing(
    deployment: lifecycle.Deployment, ray_address: str, tmp_path: Path, order: str, words: str
) -> None:
    (tmp_path / order).touch()
    settings = make_settings(tmp_path, deployment="bad", ray={"address": ray_address})
    with pytest.raises(UnavailableError, match=words):
        start(settings)
    with pytest.raises(ConfigError, match="bad is not up"):
        deployment_record.find("bad")
    with lifecycle.connected(deployment.record):
        from paceline.cluster.ray_launcher import actor_names

        assert actor_names(deployment_record.namespace_of("bad")) == []


def test_a_ray_that_does_not_answer_is_named_with_its_setting(
    runtime_folder: Path, tmp_path: Path
) -> None:
    settings = make_settings(tmp_path, deployment="bad", ray={"address": "127.0.0.1:1"})
    with pytest.raises(ConfigError, match=r"no Ray answers at 127\.0\.0\.1:1 \(ray\.address\)"):
        start(settings)


def test_ending_what_is_not_up_says_so(runtime_folder: Path) -> None:
    with pytest.raises(ConfigError, match="the deployment nobody is not up on this machine"):
        lifecycle.down("nobody")


def test_a_start_that_was_cut_off_can_be_cleaned_up(runtime_folder: Path) -> None:
    record = deployment_record.DeploymentRecord(
        deployment="cut", up_pid=2**22, started_s=0.0, settings_file="x", has_own_ray=True
    )
    deployment_record.claim(record)
    folder = record.ray_folder
    assert folder is not None
    folder.mkdir()
    with pytest.raises(ConfigError, match="Clean up with paceline down --deployment cut"):
        deployment_record.claim(record)
    lifecycle.down("cut")
    assert not folder.exists()


def test_errors_of_the_control_api_come_with_the_servers_words(
    deployment: lifecycle.Deployment,
) -> None:
    from paceline.cluster.cli.operate import drain
    from paceline.cluster.cli.operate import scale as scale_by_command

    with pytest.raises(PacelineError, match="there is no pool 'gpu'"):
        scale_by_command(["gpu=1"], "test", wait=False, as_json=True)
    with pytest.raises(PacelineError, match="nobody could stream tokens"):
        scale_by_command(["decode=0"], "test", wait=False, as_json=True)
    with pytest.raises(PacelineError, match=r"GiB .* are free on this machine"):
        scale_by_command(["decode=9000"], "test", wait=False, as_json=True)
    with pytest.raises(PacelineError, match="decode-9 is no worker that is READY"):
        drain("decode-9", "test")
