"""What is refused before Ray starts, and what is left to other machines."""

import socket
from pathlib import Path

import pytest
from unloaded_model import write_unloaded_model

from paceline.cluster.early_checks import check_port, early_findings, refuse_early
from paceline.cluster.settings import DeploymentSettings
from paceline.errors import ConfigError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with all that can be looked at without loading."""
    return write_unloaded_model(tmp_path / "model")


def make_settings(path: Path, **parts: object) -> DeploymentSettings:
    tree = {"model": {"path": str(path)}, "router": {"grpc_port": 0}}
    return DeploymentSettings.model_validate(tree | parts)


def problems(settings: DeploymentSettings) -> dict[str, str]:
    return {found.name: found.problem for found in early_findings(settings) if found.problem}


def test_settings_that_can_work_are_described(model: Path) -> None:
    found = {f.name: f.value for f in early_findings(make_settings(model))}
    assert found["model"] == f"LlamaForCausalLM in {model}"
    assert found["max_model_len"] == "512 of 512"
    assert found["dtype"] == "float32"
    assert found["tokenizer"].endswith("chat template")
    assert found["router.grpc_port"] == "0: takes a free one"
    refuse_early(make_settings(model))


def test_a_missing_tokenizer_is_refused(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in problems(make_settings(model))["tokenizer"]


def test_a_tokenizer_that_cannot_be_read_is_refused(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    assert "is not a tokenizer that can be read" in problems(make_settings(model))["model"]


def test_every_problem_is_named_at_once(model: Path) -> None:
    write_unloaded_model(model, dtype="float16")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = make_settings(
            model,
            model={"path": str(model), "max_model_len": 600},
            controller={"grpc_port": port},
        )
        with pytest.raises(ConfigError) as refused:
            refuse_early(settings)
    lines = str(refused.value).splitlines()
    assert [line.partition(" is")[0] for line in lines] == [
        "model.max_model_len",
        "The model's own dtype",
        f"port {port} on 127.0.0.1",
    ]


def test_processes_of_a_joined_cluster_look_for_themselves(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "elsewhere", ray={"address": "10.0.0.10:6379"})
    assert "model" in problems(settings)
    refuse_early(settings)


@pytest.mark.parametrize("host", ["::1", "localhost", "0.0.0.0"])
def test_a_free_port_is_free_on_hosts_of_every_form(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert check_port("router.grpc_port", host, port).problem == ""


def test_a_host_that_is_none_is_named() -> None:
    assert "router.host is 'no.such.host.invalid'" in (
        check_port("router.grpc_port", "no.such.host.invalid", 1234).problem
    )
