"""Signals that end a command: nothing is cut in half, and nothing is left."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_deployment import SilentWatcher, make_settings
from unloaded_model import write_unloaded_model

from paceline.cluster import deployment_record, lifecycle, ray_head, signals
from paceline.cluster.signals import END_SIGNALS, Ended
from paceline.errors import ConfigError

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(autouse=True)
def ended_is_raised() -> Iterator[None]:
    """Handlers as a command has them, for this test."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in END_SIGNALS}
    signals.raise_ended()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(1, 129), (2, 130), (15, 143)])
def test_each_signal_ends_a_command_with_the_shells_status(number: int, status: int) -> None:
    with pytest.raises(Ended) as ended:
        signal.raise_signal(number)
    assert (ended.value.number, ended.value.code) == (number, status)


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.raise_ended()
    with signals.held():
        signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGHUP)


def test_held_signals_come_after_the_block_and_the_first_one_counts() -> None:
    held = signals.held()
    hold = held.__enter__()
    assert not hold.has_signal
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert hold.has_signal
    with pytest.raises(Ended) as ended:
        held.__exit__(None, None, None)
    assert ended.value.number == signal.SIGTERM


def test_a_block_within_a_block_hands_its_signal_on() -> None:
    outer = signals.held()
    hold = outer.__enter__()
    with signals.held():
        signal.raise_signal(signal.SIGTERM)
    assert hold.has_signal
    with pytest.raises(Ended):
        outer.__exit__(None, None, None)


def test_a_command_that_is_ending_is_not_ended_again_until_it_goes_on() -> None:
    with pytest.raises(Ended):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGHUP)
    with signals.held() as hold:
        signal.raise_signal(signal.SIGTERM)
    assert hold.has_signal  # so that a cleanup can hurry
    signals.raise_ended()
    with pytest.raises(Ended):
        signal.raise_signal(signal.SIGINT)


def test_handlers_that_a_block_takes_away_are_put_back() -> None:
    with signals.held():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(Ended):
        signal.raise_signal(signal.SIGTERM)


LISTEN = """
import signal
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
"""
"""Tests that run in the background of a shell inherit that some are ignored."""

COMMAND = """
import subprocess, sys, time
from pathlib import Path
from paceline.cluster import ray_head

def start(folder, settings):
    folder.mkdir()
    subprocess.Popen(["sleep", "60"], cwd=folder, start_new_session=True)
    print("starting", flush=True)
    for _ in range(600):  # a signal just before a long sleep would not cut it short
        time.sleep(0.1)

ray_head.start = start
from paceline.cluster.cli import main
main()
"""


IMPORT = """
import os, signal, sys
from paceline.cluster import ray_head

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "ray._private.worker":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
ray_head.start = lambda folder, settings: "127.0.0.1:1"
from paceline.cluster.cli import main
main()
"""


class Command:
    """A command in a process of its own, with a runtime folder of its own."""

    def __init__(self, folder: Path, code: str, *arguments: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", LISTEN + code, *arguments],
            env=os.environ | {"PACELINE_RUNTIME_DIR": str(folder), "PYTHONPATH": str(SUPPORT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def read_until(self, words: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return
        raise AssertionError(f"it ended before it said {words!r}: {self.process.communicate()}")

    def end(self, *numbers: int) -> int:
        for number in numbers:
            self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=60)
        assert "Traceback" not in complaints
        return self.process.returncode

    def assert_nothing_left(self) -> None:
        assert not self.folder.exists()
        assert [p for p in psutil.process_iter() if _works_in(p, self.folder)] == []


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()).is_relative_to(folder)
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("command", "numbers", "status"),
    [
        ("up", (signal.SIGTERM,), 143),
        ("serve", (signal.SIGHUP,), 129),
        ("up", (signal.SIGINT, signal.SIGTERM), 130),
    ],
    ids=["up-SIGTERM", "serve-SIGHUP", "up-SIGINT-SIGTERM"],
)
def test_a_start_that_is_ended_leaves_nothing(
    tmp_path: Path, command: str, numbers: tuple[int, ...], status: int
) -> None:
    port = ("--set", "router.grpc_port=0")
    running = Command(tmp_path / "rt", COMMAND, command, *port)
    running.read_until("starting")
    assert running.end(*numbers) == status
    running.assert_nothing_left()


def test_a_start_that_is_ended_while_ray_is_imported_leaves_nothing(tmp_path: Path) -> None:
    """Cut in the middle, the import could not be done again to clean up."""
    running = Command(tmp_path / "rt", IMPORT, "up", "--set", "router.grpc_port=0")
    assert running.end() == 143
    running.assert_nothing_left()


@pytest.mark.parametrize("number", END_SIGNALS)
def test_a_signal_while_the_record_is_written_leaves_none(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_RUNTIME_DIR", str(tmp_path / "rt"))
    claim = deployment_record.claim

    def claim_and_signal(record: Any) -> None:
        claim(record)
        signal.raise_signal(number)

    monkeypatch.setattr(deployment_record, "claim", claim_and_signal)
    with pytest.raises(Ended):
        lifecycle.up(make_settings(tmp_path), "test.yaml", SilentWatcher())
    assert not (tmp_path / "rt").exists()


def test_a_start_that_is_refused_leaves_the_other_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACELINE_RUNTIME_DIR", str(tmp_path / "rt"))
    settings = make_settings(tmp_path)

    def start_again(_: object) -> None:
        with pytest.raises(ConfigError, match="is being started by process"):
            lifecycle.up(settings, "test.yaml", SilentWatcher())
        assert deployment_record.find("test").up_pid == os.getpid()
        raise ConfigError("that was all")

    with pytest.raises(ConfigError, match="that was all"):
        lifecycle.up(settings, "test.yaml", SilentWatcher(), check=start_again)
    assert not (tmp_path / "rt").exists()


SERVE = """
import sys
from functools import partial
import ray
import fake_hosted
from paceline.cluster import lifecycle

ray.cloudpickle.register_pickle_by_value(fake_hosted)
lifecycle.up = partial(lifecycle.up, build=fake_hosted.build_fake)
from paceline.cluster.cli import main
main()
"""


def test_a_deployment_that_serves_ends_when_its_command_is_ended(tmp_path: Path) -> None:
    folder = Path(f"/tmp/ps-{os.getpid()}")  # short, because Ray makes sockets in it
    model = write_unloaded_model(tmp_path / "model", max_position_embeddings=4096)
    settings = (f"model.path={model}", "router.grpc_port=0", "deployment=served")
    sizes = ("prefill.kv_cache_bytes=1000000", "decode.kv_cache_bytes=1000000")
    flags = [part for setting in (*settings, *sizes) for part in ("--set", setting)]
    serving = Command(folder, SERVE, "serve", *flags)
    try:
        serving.read_until("serves at")
        # The second one comes while it cleans up.
        assert serving.end(signal.SIGTERM, signal.SIGTERM) == 0
        serving.assert_nothing_left()
    finally:
        for ray_folder in folder.glob("r-*"):
            ray_head.stop(ray_folder)
        shutil.rmtree(folder, ignore_errors=True)
