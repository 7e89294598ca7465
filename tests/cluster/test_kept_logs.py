"""Logs of failed starts: they stay, they are few, and the error says where they are."""

from pathlib import Path

import pytest
from fake_deployment import make_settings, start

from paceline.cluster import kept_logs, ray_head
from paceline.cluster.runtime_folder import VARIABLE
from paceline.cluster.settings import RaySettings
from paceline.errors import ConfigError


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runtime"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


def write_logs(ray_folder: Path, **logs: str) -> None:
    folder = ray_folder / "session_1" / "logs"
    folder.mkdir(parents=True)
    (ray_folder / "session_latest").symlink_to("session_1")
    for name, text in logs.items():
        (folder / f"{name}.log").write_text(text)


def start_that_fails(folder: Path, settings: RaySettings) -> str:
    write_logs(folder, gcs_server="no room", raylet="")
    raise ConfigError("Ray did not start: no room")


def test_a_failed_start_says_where_its_logs_are_and_leaves_nothing_else(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_head, "start", start_that_fails)
    with pytest.raises(ConfigError, match="Ray did not start: no room") as failure:
        start(make_settings(tmp_path))
    (note,) = failure.value.__notes__
    assert str(runtime / "logs" / "test") in note
    left = [path for path in runtime.rglob("*") if path.is_file()]
    assert left == [runtime / "logs" / "test" / "gcs_server.log"]
    assert left[0].read_text() == "no room"


def test_the_next_start_of_the_name_removes_them(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_head, "start", start_that_fails)
    with pytest.raises(ConfigError):
        start(make_settings(tmp_path))

    def start_that_is_interrupted(folder: Path, settings: RaySettings) -> str:
        assert not (runtime / "logs").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_head, "start", start_that_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(make_settings(tmp_path))
    assert not runtime.exists()


def test_a_start_without_logs_keeps_none(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_without_logs(folder: Path, settings: RaySettings) -> str:
        raise ConfigError("Ray did not start")

    monkeypatch.setattr(ray_head, "start", start_without_logs)
    with pytest.raises(ConfigError) as failure:
        start(make_settings(tmp_path))
    assert not hasattr(failure.value, "__notes__")
    assert not runtime.exists()


def test_kept_logs_have_a_bound_in_size_and_number(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_logs, "MAX_FILE_BYTES", 4)
    monkeypatch.setattr(kept_logs, "MAX_FILES", 2)
    write_logs(tmp_path / "ray", one="the cause", two="the cause", three="the cause")
    for number in range(kept_logs.MAX_STARTS + 3):
        kept = kept_logs.keep(f"d{number}", tmp_path / "ray")
        assert kept is not None
    assert [path.read_text() for path in kept.iterdir()] == ["ause", "ause"]
    assert len(list((runtime / "logs").iterdir())) == kept_logs.MAX_STARTS
    assert kept.exists()
