"""Named places where tests inject faults: `PACELINE_FAILPOINT=name:action@n`, several separated by
commas.

The action happens at the n-th hit of the name in this process (n from 1, default 1). `@a-b` draws n
anew in each process, so that a worker and its replacement fail at unlike moments. Actions: `kill`
ends the process by SIGKILL, `kill=PID` another one, `stop` halts the process by SIGSTOP,
`delay=SECONDS` sleeps. Without the variable a hit costs one look at an empty dict.
"""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from paceline.errors import ConfigError

VARIABLE = "PACELINE_FAILPOINT"

_ENTRY = re.compile(
    r"([^:@]+):(kill(?:=\d+)?|stop|delay=\d+(?:\.\d+)?)(?:@([1-9]\d*)(?:-([1-9]\d*))?)?"
)


@dataclass(slots=True)
class _Armed:
    action: str
    remaining_hits: int


class Failpoints:
    """The armed failpoints of one process; inert when built from an empty specification."""

    def __init__(self, specification: str = "") -> None:
        self._lock = threading.Lock()
        self._armed: dict[str, _Armed] = {}
        self.arm(specification)

    @classmethod
    def from_environment(cls) -> "Failpoints":
        return cls(os.environ.get(VARIABLE, ""))

    def arm(self, specification: str) -> None:
        """Replace what is armed. Raises ConfigError for a specification that cannot be read."""
        self._armed = dict(_parse(specification))

    def hit(self, name: str) -> None:
        """Do what is armed for this name, if anything."""
        if not self._armed:
            return
        with self._lock:
            armed = self._armed.get(name)
            if armed is None:
                return
            armed.remaining_hits -= 1
            if armed.remaining_hits:
                return
        _act(armed.action)


def _parse(specification: str) -> Iterable[tuple[str, _Armed]]:
    for entry in filter(None, specification.split(",")):
        match = _ENTRY.fullmatch(entry)
        name, action, first, last = match.groups() if match else ("", "", None, None)
        lowest = int(first or "1")
        highest = int(last or lowest)
        if match is None or highest < lowest:
            raise ConfigError(
                f"{VARIABLE} has the entry {entry!r}; it must read name:action@n or "
                "name:action@a-b, a at most b, with an action of kill, kill=PID, stop or "
                "delay=SECONDS"
            )
        yield name, _Armed(action, random.randint(lowest, highest))


def _act(action: str) -> None:
    if action.startswith("delay="):
        time.sleep(float(action.removeprefix("delay=")))
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        victim = int(action.removeprefix("kill=")) if "=" in action else os.getpid()
        os.kill(victim, signal.SIGKILL)
