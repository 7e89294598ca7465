"""One Ray for all component tests of this folder, with processes that load no model."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_deployment import make_settings, start

from paceline.cluster import lifecycle, ray_head
from paceline.cluster.runtime_folder import VARIABLE


@pytest.fixture(scope="session")
def runtime_folder() -> Iterator[Path]:
    """A folder for records and Ray: short, because Ray makes sockets in it."""
    folder = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))
    os.environ[VARIABLE] = str(folder)
    yield folder
    del os.environ[VARIABLE]
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which tests tell the fakes of the shared deployment what to do."""
    return tmp_path_factory.mktemp("orders")


@pytest.fixture(scope="session")
def deployment(runtime_folder: Path, orders: Path) -> Iterator[lifecycle.Deployment]:
    """A deployment of fakes that is up, shared by the tests of this folder."""
    started = start(make_settings(orders))
    yield started
    lifecycle.down("test")
    assert started.record.ray_folder is not None
    assert ray_head.find_processes(started.record.ray_folder) == []
    assert list(runtime_folder.glob("*")) == []
