"""Records of deployments: what happens when their folder cannot be used."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from paceline.cluster import deployment_record, model_cache
from paceline.cluster.deployment_record import DeploymentRecord
from paceline.cluster.runtime_folder import VARIABLE, runtime_dir
from paceline.errors import ConfigError

RECORD = DeploymentRecord("mine", 1, 0.0, "local.yaml", has_own_ray=True)
USES = [
    pytest.param(lambda: deployment_record.claim(RECORD), id="claim"),
    pytest.param(lambda: deployment_record.update(RECORD, ray_address="here:1"), id="update"),
    pytest.param(lambda: deployment_record.remove("mine"), id="remove"),
    pytest.param(lambda: deployment_record.find(None), id="find the only one"),
    pytest.param(lambda: deployment_record.find("mine"), id="find by name"),
]


@pytest.mark.parametrize("use", USES)
def test_a_folder_that_cannot_be_used_is_named_with_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[], object]
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "runtime"
    monkeypatch.setenv(VARIABLE, str(folder))
    with pytest.raises(ConfigError, match=f"{folder} cannot be used.*Set PACELINE_RUNTIME_DIR"):
        use()


def test_a_relative_folder_is_the_same_wherever_a_process_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, "runtime")
    assert runtime_dir() == tmp_path / "runtime"


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
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="File name too long"):
        deployment_record.find("x" * 300)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("what", ["owner", "mode", "link"])
def test_a_folder_that_others_can_write_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[], object], what: str
) -> None:
    folder = tmp_path / "runtime"
    monkeypatch.setenv(VARIABLE, str(folder))
    deployment_record.claim(RECORD)
    match what:
        case "owner":
            monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
            problem = "belongs to user"
        case "mode":
            folder.chmod(0o777)
            problem = "has the mode 777"
        case _:
            folder.rename(tmp_path / "elsewhere")
            folder.symlink_to(tmp_path / "elsewhere")
            problem = "is a link"
    with pytest.raises(ConfigError, match=f"{problem}.*cannot be trusted"):
        use()
    assert [path.name for path in folder.iterdir()] == ["mine.json"]


def test_a_record_cannot_name_a_folder_to_remove_or_be_of_another_deployment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    deployment_record.claim(RECORD)
    assert RECORD.ray_folder is not None
    assert RECORD.ray_folder.parent == tmp_path
    path = tmp_path / "mine.json"
    values = json.loads(path.read_text())
    for changes in ({"ray_folder": "/home"}, {"deployment": "../../home"}):
        path.write_text(json.dumps(values | changes))
        with pytest.raises(ConfigError, match=r"mine\.json cannot be read"):
            deployment_record.find("mine")


@pytest.mark.parametrize(
    ("name", "value"),
    [("up_pid", "x"), ("started_s", None), ("has_own_ray", 5), ("controller_address", 7)],
)
def test_a_record_with_a_value_of_another_type_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    deployment_record.claim(RECORD)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ConfigError, match=rf"mine\.json cannot be read \({name} is "):
        deployment_record.find("mine")


def test_a_claim_leaves_one_whole_record_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    deployment_record.claim(RECORD)
    with pytest.raises(ConfigError, match=r"an earlier start of the deployment mine|being started"):
        deployment_record.claim(RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    assert deployment_record.find("mine") == RECORD
