"""The command line: what it prints, in which form, and how it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import write_tiny_model
from typer.testing import CliRunner

from paceline.cluster import deployment_record, lifecycle, ray_head
from paceline.cluster.cli.app import app
from paceline.cluster.cli.machine import Finding
from paceline.cluster.cli.output import out
from paceline.cluster.deployment_record import DeploymentRecord
from paceline.cluster.settings_file import DEFAULT_FILE
from paceline.errors import ConfigError

COMMANDS = (
    *("up", "serve", "down", "status", "scale", "drain", "generate", "chat"),
    *("config", "check", "demo", "bench"),
)


def run(*arguments: str) -> str:
    """Run a command; errors of ours come out as they were raised."""
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def paceline(
    *arguments: str | bytes, stdin: bytes = b"", code: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nfrom paceline.cluster.cli import main; main()",
            *arguments,
        ],
        env=os.environ | environment,
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )
    return subprocess.CompletedProcess(
        result.args, result.returncode, result.stdout.decode(), result.stderr.decode()
    )


def assert_is_one_error(result: subprocess.CompletedProcess[str], words: str) -> None:
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_help_lists_every_command_and_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; sys.argv = ['paceline', '--help']\n"
        "from paceline.cluster.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'ray', 'grpc', 'pydantic'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.rstrip().endswith("set()")
    for command in COMMANDS:
        assert f" {command} " in result.stdout


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "config"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_every_command_explains_itself(command: str, option: str) -> None:
    assert f"Usage: paceline {command} " in run(command, option)


def test_a_refusal_is_one_line_on_stderr_without_a_traceback() -> None:
    result = paceline("config", "show", "/nowhere.yaml")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: the settings file /nowhere.yaml does not exist")
    assert "Traceback" not in result.stderr


FAILS = """
from paceline.cluster.cli import configuration
def fail(*arguments): raise LookupError("nothing there")
configuration.show = fail
"""


def test_an_unexpected_error_is_one_line_with_its_place_and_the_way_to_the_traceback() -> None:
    result = paceline("config", "show", code=FAILS)
    assert_is_one_error(result, "LookupError: nothing there (<string>:3)")
    assert "PACELINE_TRACEBACK=1" in result.stderr
    result = paceline("config", "show", code=FAILS, PACELINE_TRACEBACK="1")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr


def test_arguments_and_standard_input_that_are_not_utf8_are_refused_by_name() -> None:
    assert_is_one_error(paceline("generate", b"caf\xe9"), "argument 2 is not UTF-8 text")
    result = paceline("generate", "-", stdin=b"caf\xe9", PYTHONUTF8="1")
    assert_is_one_error(result, "standard input is not UTF-8 text")


CHECKLIST = """
from paceline.cluster import lifecycle
from paceline.errors import ConfigError
def up(settings, file, watcher):
    watcher.began("start Ray")
    watcher.ended("start Ray", 1.0)
    raise ConfigError("\\u2713 \\xb7 \\u20ac this is far enough")
lifecycle.up = up
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
    ],
    ids=["C", "POSIX", "PYTHONIOENCODING"],
)
def test_everything_can_be_printed_in_an_ascii_locale(environment: dict[str, str]) -> None:
    result = paceline("config", "show", "--set", "model.path=/Modelle/größe", **environment)
    assert result.returncode == 0
    assert "/Modelle/gr" in result.stdout
    result = paceline("up", "--set", "model.path=größe", code=CHECKLIST, **environment)
    assert result.returncode == 1
    assert "start Ray 1.0 s" in result.stderr
    assert "this is far enough" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-tokens", "99999999999999999999"),
        ("--seed", str(2**64)),
        ("--top-k", str(2**32)),
        ("--temperature", "1e400"),
        ("--top-p", "1e400"),
    ],
)
def test_a_number_that_no_request_can_hold_is_refused_by_its_flag(flag: str, value: str) -> None:
    result = CliRunner().invoke(app, ["generate", "a prompt", flag, value])
    assert result.exit_code == 2
    assert f"Invalid value for '{flag}'" in result.output


def test_output_that_nobody_reads_on_ends_a_command_quietly() -> None:
    command = f"{sys.executable} -c 'from paceline.cluster.cli import main; main()' config show"
    result = subprocess.run(
        ["bash", "-c", f"{command} | head -1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.startswith("setting ")
    assert result.stderr == ""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_standard_stream_may_be_closed(closed: str) -> None:
    command = f'"$0" -c "from paceline.cluster.cli import main; main()" --version {closed}'
    result = subprocess.run(
        ["bash", "-c", command, sys.executable], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_output_that_cannot_be_written_is_an_error() -> None:
    command = f"{sys.executable} -c 'from paceline.cluster.cli import main; main()' config show"
    result = subprocess.run(
        ["bash", "-c", f"{command} >/dev/full"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert_is_one_error(result, "No space left on device")


def test_status_without_a_deployment_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="no deployment is up on this machine"):
        run("status")


def test_config_show_names_the_origin_of_each_value() -> None:
    entries = json.loads(run("config", "show", "--json", "--set", "decode.replicas=2"))
    found = {entry["key"]: entry for entry in entries}
    assert found["decode.replicas"]["source"] == "flag"
    assert found["decode.replicas"]["value"] == 2
    assert found["model.path"]["where"].startswith("local.yaml line ")
    assert found["kv.block_tokens"]["source"] == "default"
    assert "--set decode.replicas=2" in run("config", "show", "--set", "decode.replicas=2")


def test_config_show_lists_the_end_tokens_of_a_folder_and_their_files(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    override = f"model.path={tmp_path}"
    entries = json.loads(run("config", "show", "--json", "--set", override))
    ends = {entry["value"]: entry["where"] for entry in entries if entry["key"] == "end token"}
    both = "config.json, generation_config.json, tokenizer_config.json"
    assert ends == {2: both, 5: "generation_config.json"}
    table = run("config", "show", "--set", override)
    assert "end token" in table
    assert "tokenizer_config.json" in table


def test_config_show_works_without_the_model() -> None:
    result = CliRunner().invoke(app, ["config", "show", "--set", "model.path=/no/such/model"])
    assert result.exit_code == 0
    assert "end token" not in result.stdout
    assert "end tokens are not known: There is no /no/such/model" in result.stderr


def test_check_reports_cores_memory_and_transports() -> None:
    arguments = ("check", "--json", "--set", "router.grpc_port=0")
    findings = {entry["name"]: entry for entry in json.loads(run(*arguments))}
    assert {"cores", "memory", "torch", "ray", "shm", "torch_distributed"} <= set(findings)
    assert {"model", "max_model_len", "dtype", "tokenizer", "router.grpc_port"} <= set(findings)
    assert all(finding["is_good"] for finding in findings.values())
    assert "gpu" in findings or "gpu 0" in findings
    assert "Gloo" in findings["torch_distributed"]["value"]


def test_check_lists_each_thing_that_up_would_refuse(taken_port: int) -> None:
    overrides = ("model.max_model_len=9000", f"router.grpc_port={taken_port}")
    arguments = [part for override in overrides for part in ("--set", override)]
    result = CliRunner().invoke(app, ["check", "--json", *arguments])
    assert result.exit_code == 1
    bad = {f["name"]: f["advice"] for f in json.loads(result.stdout) if not f["is_good"]}
    assert set(bad) == {"max_model_len", "router.grpc_port"}
    assert "Set max_model_len to at most 8192" in bad["max_model_len"]


def test_check_does_not_blame_a_deployment_for_its_own_port(
    taken_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_RUNTIME_DIR", str(tmp_path))
    record = DeploymentRecord(
        "local", 1, 0.0, "x", has_own_ray=False, controller_address="127.0.0.1:1"
    )
    deployment_record.claim(record)
    findings = json.loads(run("check", "--json", "--set", f"router.grpc_port={taken_port}"))
    [port] = [finding for finding in findings if finding["name"] == "router.grpc_port"]
    assert port["value"] == "not free, and the deployment local is up"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.path=/nowhere", "There is no /nowhere"),
        ("model.max_model_len=9000", "Set max_model_len to at most 8192"),
        ("router.grpc_port=PORT", r"port \d+ on 127.0.0.1 is not free"),
    ],
)
@pytest.mark.parametrize("command", ["up", "serve", "demo"])
def test_what_can_be_known_is_refused_before_ray_starts(
    command: str,
    override: str,
    words: str,
    taken_port: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PACELINE_RUNTIME_DIR", str(tmp_path))

    def start_ray(*arguments: object) -> str:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_head, "start", start_ray)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(ConfigError, match=words):
            run(command, "--set", override.replace("PORT", str(taken_port)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not tmp_path.exists()  # no record is left, so the folder of records is not either


def test_a_refusal_before_ray_loads_neither_ray_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['paceline', 'up', '--set', 'model.max_model_len=9000']\n"
        "from paceline.cluster.cli import main\n"
        "try: main()\n"
        "finally: print('loaded', {'ray', 'torch', 'transformers'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PACELINE_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Set max_model_len to at most 8192" in result.stderr
    assert result.stdout.rstrip() == "loaded set()"


def findings_for_a_gpu(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Finding]:
    """What `check` finds for cluster/gpu.yaml on a machine without a GPU."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    file = DEFAULT_FILE.with_name("gpu.yaml")
    arguments = [part for override in overrides for part in ("--set", override)]
    result = CliRunner().invoke(app, ["check", str(file), "--json", *arguments])
    findings = [Finding(**entry) for entry in json.loads(result.stdout)]
    assert result.exit_code == (0 if all(finding.is_good for finding in findings) else 1)
    return {finding.name: finding for finding in findings}


def test_check_says_what_a_deployment_on_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = findings_for_a_gpu(monkeypatch)
    assert not found["gpu"].is_good
    assert found["gpu"].advice
    assert "the pools would need 1 GPU (1 decode × 1)" in found["room for gpu"].advice
    assert found["shm"].is_good


def test_gpus_may_be_elsewhere_when_a_ray_cluster_runs_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = findings_for_a_gpu(monkeypatch, "ray.address=10.0.0.10:6379")
    assert all(finding.is_good for finding in found.values())


def test_check_describes_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)

    def memory(number: int) -> tuple[int, int]:
        if number == 1:
            raise RuntimeError("CUDA error: out of memory")
        return 100 << 30, 139 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    file = str(DEFAULT_FILE.with_name("gpu.yaml"))
    result = CliRunner().invoke(app, ["check", file, "--json"])
    found = {entry["name"]: Finding(**entry) for entry in json.loads(result.stdout)}
    assert found["gpu 0"].value == (
        "NVIDIA H200, compute capability 9.0, torch for CUDA 13.0, 100.00 GiB free of 139.00 GiB"
    )
    assert found["gpu 1"].value.endswith(": cannot be used")
    assert found["gpu 1"].advice == "CUDA error: out of memory"
    assert found["room for gpu"].is_good


def test_status_is_data_for_programs_and_a_table_for_people(
    deployment: lifecycle.Deployment,
) -> None:
    document = json.loads(run("status", "--deployment", "test", "--json"))
    assert document["deployment"] == "test"
    assert {p["worker_id"] for p in document["processes"]} >= {"router-0", "decode-0"}
    table = run("status", "--deployment", "test")
    assert "prefill-0" in table
    assert "ready" in table


def test_status_needs_no_ray_and_is_quick(deployment: lifecycle.Deployment) -> None:
    code = (
        "import sys; sys.argv = ['paceline', 'status', '--deployment', 'test']\n"
        "from paceline.cluster.cli import main\n"
        "try: main()\n"
        "finally: print('loaded', {'ray', 'torch'} & set(sys.modules))\n"
    )
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.rstrip().endswith("loaded set()")
    # 0.3 s alone on a quiet machine; generous, because tests share theirs.
    assert time.monotonic() - began < 3.0


def test_scale_takes_one_size_for_each_pool() -> None:
    with pytest.raises(ConfigError, match="decode=1 decode=2 names a pool twice"):
        run("scale", "decode=1", "decode=2")


def test_brackets_in_what_is_printed_are_no_markup() -> None:
    assert out.render_str("[fd00::1]:50051").plain == "[fd00::1]:50051"


def test_scale_waits_for_the_new_size(deployment: lifecycle.Deployment) -> None:
    grown = json.loads(run("scale", "decode=2", "--deployment", "test", "--json"))
    assert {p["name"]: p["ready"] for p in grown["pools"]} == {"prefill": 1, "decode": 2}
    assert "decode 1 of 1 ready" in run("scale", "decode=1", "--deployment", "test")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("decode", "must read POOL=SIZE"),
        ("decode=-1", "is -1"),
        ("decode=x", "is x"),
        ("decode=²", "is ²"),
        ("decode=99999999999", "9 digits at most"),
    ],
)
def test_a_size_that_is_none_is_refused(size: str, words: str) -> None:
    from paceline.errors import PacelineError

    with pytest.raises(PacelineError, match=words):
        run("scale", size)
