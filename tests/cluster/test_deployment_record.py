"""Records of deployments: what happens when their folder cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.cluster import deployment_record, model_cache
from paceline.cluster.deployment_record import DeploymentRecord
from paceline.errors import ConfigError

RECORD = DeploymentRecord("mine", 1, 0.0, "local.yaml", None)


@pytest.mark.parametrize(
    "use",
    [
        lambda: deployment_record.claim(RECORD),
        lambda: deployment_record.update(RECORD, ray_address="here:1"),
        lambda: deployment_record.remove("mine"),
        lambda: deployment_record.find(None),
        lambda: deployment_record.find("mine"),
    ],
    ids=["claim", "update", "remove", "find the only one", "find by name"],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[], object]
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "runtime"
    monkeypatch.setenv(deployment_record.VARIABLE, str(folder))
    with pytest.raises(ConfigError, match=f"{folder} cannot be used.*Set PACELINE_RUNTIME_DIR"):
        use()


def test_a_relative_folder_is_the_same_wherever_a_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(deployment_record.VARIABLE, "runtime")
    assert deployment_record.runtime_dir() == tmp_path / "runtime"


def test_a_relative_cache_is_refused_because_workers_run_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(model_cache.VARIABLE, "cache")
    with pytest.raises(
        ConfigError, match="PACELINE_CACHE_DIR is cache: it must be an absolute path"
    ):
        model_cache.model_cache_dir()


def test_a_name_that_no_file_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(deployment_record.VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="File name too long"):
        deployment_record.find("x" * 300)


@pytest.mark.parametrize(
    ("name", "value"),
    [("up_pid", "x"), ("started_s", None), ("ray_folder", 5), ("controller_address", 7)],
)
def test_a_record_with_a_value_of_another_type_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setenv(deployment_record.VARIABLE, str(tmp_path))
    deployment_record.claim(RECORD)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match=rf"mine\.json cannot be read \({name} is "):
        deployment_record.find("mine")


def test_a_claim_leaves_one_whole_record_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(deployment_record.VARIABLE, str(tmp_path))
    deployment_record.claim(RECORD)
    with pytest.raises(ConfigError, match=r"an earlier start of the deployment mine|being started"):
        deployment_record.claim(RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    assert deployment_record.find("mine") == RECORD
