"""How a Ray of a deployment's own is started. The real one is in test_lifecycle."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from paceline.cluster import ray_head
from paceline.cluster.settings import RaySettings
from paceline.errors import ConfigError


@pytest.fixture
def ray_start(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray start` was called with; it fails."""
    called: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        called.update(options)
        return subprocess.CompletedProcess(command, 1, "no room")

    monkeypatch.setattr(subprocess, "run", run)
    return called


@pytest.fixture
def folder() -> Path:
    return Path(f"/tmp/pl-{os.getpid()}")  # short, because Ray makes sockets in it


def test_nothing_of_another_ray_reaches_ours(
    ray_start: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another Ray")
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
    try:
        with pytest.raises(ConfigError, match="Ray did not start: no room"):
            ray_head.start(folder, RaySettings())
        token_path = ray_head.token_path(folder)
        assert len(token_path.read_text()) == 64
    finally:
        ray_head.stop(folder)
    environment = ray_start["env"]
    assert {"RAY_ADDRESS", "RAY_AUTH_TOKEN"}.isdisjoint(environment)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(token_path)
    assert environment["RAY_OVERRIDE_RESOURCES"] == '{"GPU": 1}'


def test_a_folder_that_nothing_records_any_more_is_cleared(
    ray_start: dict[str, Any], folder: Path
) -> None:
    folder.mkdir()
    (folder / "orphan").touch()
    try:
        with pytest.raises(ConfigError, match="Ray did not start"):
            ray_head.start(folder, RaySettings())
        assert not (folder / "orphan").exists()
    finally:
        ray_head.stop(folder)
