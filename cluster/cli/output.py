"""Print for people, or JSON for programs: data on stdout, everything else on stderr."""

import codecs
import dataclasses
import io
import json
import os
import sys
from enum import Enum
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH_ELSEWHERE = 150
"""Columns when the output is no terminal: a file has room, and a table must not be cut."""
_ASCII = {"✓": "+", "✗": "x", "·": "-", "–": "-", "…": "...", "×": "x"}
"""What stands for our own signs where they cannot be written."""


def _console(is_stderr: bool) -> Console:
    stream = sys.stderr if is_stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_ELSEWHERE
    # Without markup: an IPv6 address, or a word in brackets of an error, would be taken as a tag.
    return Console(stderr=is_stderr, highlight=False, markup=False, soft_wrap=True, width=width)


out = _console(is_stderr=False)
err = _console(is_stderr=True)


def write_any_character() -> None:
    """Let stdout and stderr escape what their encoding lacks, as ASCII's does with LC_ALL=C."""
    codecs.register_error("paceline.ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="paceline.ascii")


def flush() -> None:
    """Write what is still buffered. Raises OSError; then nothing more is tried at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def print_json(data: object) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(data, indent=2, default=_plain) + "\n")


def print_error(message: str) -> None:
    err.print(Text("error: ", style="bold red") + Text(message))


def print_note(message: str) -> None:
    err.print(Text(message, style="dim"))


def gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(escaped), error.end


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} is not data")
