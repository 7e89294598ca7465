"""A failpoint acts at its n-th hit and never otherwise."""

import os
import signal
import subprocess
import sys
import time

import pytest

from paceline import failpoints
from paceline.errors import ConfigError
from paceline.failpoints import VARIABLE, Failpoints

HITS = "from paceline.failpoints import Failpoints; f = Failpoints.from_environment()"


@pytest.fixture
def acts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record actions instead of doing them."""
    seen: list[str] = []
    monkeypatch.setattr(failpoints, "_act", seen.append)
    return seen


def run_hits(specification: str, *names: str) -> "subprocess.Popen[bytes]":
    code = "; ".join([HITS, *(f"f.hit({name!r})" for name in names), "print('alive', flush=True)"])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, VARIABLE: specification},
        stdout=subprocess.PIPE,
    )


def test_nothing_armed_does_nothing(acts: list[str]) -> None:
    Failpoints().hit("published")
    assert acts == []


def test_action_happens_at_its_hit_alone(acts: list[str]) -> None:
    points = Failpoints("token:kill@3,published:stop")
    for name in ("token", "token", "other", "published", "token", "token", "published"):
        points.hit(name)
    assert acts == ["stop", "kill"]


def test_of_a_range_each_process_draws_its_own_hit(acts: list[str]) -> None:
    drawn = set()
    for _ in range(200):
        points = Failpoints("token:kill@3-5")
        num_hits = 0
        while not acts:
            points.hit("token")
            num_hits += 1
        acts.clear()
        drawn.add(num_hits)
    assert drawn == {3, 4, 5}


def test_arming_replaces_what_was_armed(acts: list[str]) -> None:
    points = Failpoints("token:kill")
    points.arm("published:stop")
    points.hit("token")
    points.hit("published")
    points.arm("")
    points.hit("published")
    assert acts == ["stop"]


@pytest.mark.parametrize(
    "specification",
    [
        "token",
        "token:kill@5-3",
        "token:kill@5-",
        "token:",
        ":kill",
        "token:explode",
        "token:kill@",
        "token:kill@0",
        "token:kill@-1",
        "token:kill@x",
        "token:kill=x",
        "token:delay",
        "token:delay=",
        "token:delay=soon",
        "token:delay=-1",
        "published:kill,token:no",
    ],
)
def test_specification_that_cannot_be_read_is_refused(specification: str) -> None:
    with pytest.raises(ConfigError, match="must read name:action@n"):
        Failpoints(specification)


def test_kill_ends_the_process_at_its_hit() -> None:
    with run_hits("b:kill@2", "a", "b", "b") as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert output == b""


def test_process_lives_when_the_hit_does_not_come() -> None:
    with run_hits("b:kill@2", "a", "b") as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert output == b"alive\n"


def test_stop_halts_the_process_until_it_is_continued() -> None:
    with run_hits("a:stop", "a") as process:
        deadline = time.monotonic() + 30
        stopped = False
        while not stopped and time.monotonic() < deadline:
            pid, status = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
            stopped = pid != 0 and os.WIFSTOPPED(status)
        assert stopped
        os.kill(process.pid, signal.SIGCONT)
        output, _ = process.communicate(timeout=30)
    assert output == b"alive\n"


def test_kill_of_another_process_ends_that_one() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        Failpoints(f"a:kill={victim.pid}").hit("a")
        assert victim.wait(timeout=30) == -signal.SIGKILL


def test_delay_sleeps_for_its_seconds() -> None:
    points = Failpoints("a:delay=0.05")
    before = time.monotonic()
    points.hit("a")
    assert time.monotonic() - before >= 0.05
