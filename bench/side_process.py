"""Run a command to its end or its deadline, and show meanwhile what it says on standard error."""

import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from threading import Thread
from typing import IO, NamedTuple, TextIO

NUM_LAST_LINES = 30
JOIN_TIMEOUT_S = 5.0
"""A process that the command left behind may hold its output open."""


class Ended(NamedTuple):
    """What became of a process."""

    status: int | None
    """None: it was killed at its deadline"""
    last_lines: str
    """Of standard output and standard error"""


def run_to_end(command: Sequence[str], timeout_s: float) -> Ended:
    """Run a command; pass its standard error on line by line, keep its standard output back."""
    last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    readers = [
        Thread(target=_read, args=(stream, last_lines, shown), daemon=True)
        for stream, shown in ((process.stdout, None), (process.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    status: int | None = None
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        pass  # that it has no status says so
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join(JOIN_TIMEOUT_S)
    return Ended(status, "".join(last_lines))


def _read(stream: IO[str], last_lines: deque[str], shown: TextIO | None) -> None:
    with stream:
        for line in stream:
            last_lines.append(line)
            if shown is not None:
                shown.write(line)
                shown.flush()
