"""Start, question and kill worker processes that run without Ray."""

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORKER_MAIN = Path(__file__).with_name("worker_main.py")
START_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 30.0
_incarnations = itertools.count(time.time_ns())


class WorkerHandle:
    """One worker process. `wait_started` before anything else; `stop` or `kill` in the end."""

    def __init__(self, role: str, number: int, log: Path, **config: Any) -> None:
        self.role = role
        self.worker_id = f"{role}-{number}"
        self.incarnation = next(_incarnations)
        self.address = ""
        self._log = log.open("a")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment.update(config.pop("environment", {}))
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER_MAIN)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
            env=environment,
        )
        config |= {"role": role, "worker_id": self.worker_id, "incarnation": self.incarnation}
        self._write(config)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def wait_started(self) -> "WorkerHandle":
        self.address = self._read(START_TIMEOUT_S)["address"]
        return self

    def ask(self, do: str, **fields: Any) -> Any:
        """Run a command in the worker; raises AssertionError with the worker's own error."""
        self._write({"do": do, **fields})
        answer = self._read(ANSWER_TIMEOUT_S)
        assert answer["ok"], f"{self.worker_id}: {answer['value']}"
        return answer["value"]

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self.wait_dead()

    def wait_dead(self) -> None:
        self._process.wait(ANSWER_TIMEOUT_S)
        self._close()

    def stop(self) -> None:
        """Stop in good order, and fail if that does not work."""
        if not self.is_alive:
            self._close()
            return
        try:
            self.ask("stop")
            self._process.wait(ANSWER_TIMEOUT_S)
        finally:
            if self.is_alive:
                self._process.kill()
                self._process.wait()
            self._close()

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue
        self._log.close()

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else ""
        what = "ended" if ready else f"did not answer within {timeout_s} s"
        assert line, f"{self.worker_id} {what}; see {self._log.name}"
        answer: dict[str, Any] = json.loads(line)
        return answer
