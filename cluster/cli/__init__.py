"""The command line: translate between a terminal and the deployment. Decides nothing itself.

Commands import what they need when they run, so that `paceline --help` and `status` are quick.
"""

import os
import sys

from paceline.cluster import signals

TRACEBACK_VARIABLE = "PACELINE_TRACEBACK"


def main() -> None:
    """Run `paceline`. Whatever fails is one message on stderr and an exit status of 1.

    A signal that ends it gives 128 + its number.
    """
    signals.raise_ended()
    _open_missing_streams()
    from paceline.cluster.cli import output
    from paceline.errors import PacelineError, cause_of

    try:
        output.write_any_character()
        _run(sys.argv[1:])
    except BrokenPipeError:  # as in `paceline status | head -1`: nobody reads on
        sys.exit(1)
    except PacelineError as error:
        output.print_error("\n".join([str(error), *_notes(error)]))
        sys.exit(1)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        message = (
            f"paceline did not expect this: {cause_of(error)}. With {TRACEBACK_VARIABLE}=1 in the "
            "environment it prints a traceback, which helps when you report it"
        )
        output.print_error("\n".join([message, *_notes(error)]))
        sys.exit(1)


def _open_missing_streams() -> None:
    """Put the null device where the caller closed a standard stream, as in `paceline up >&-`.

    Python has None there, and the next file or socket would get the stream's number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _notes(error: Exception) -> list[str]:
    """Return what callers have added, such as where the logs are."""
    return getattr(error, "__notes__", [])


def _run(arguments: list[str]) -> None:
    from paceline.cluster.cli.app import app
    from paceline.cluster.cli.output import flush
    from paceline.cluster.cli.text import as_text

    texts = [as_text(given, f"argument {n}") for n, given in enumerate(arguments, start=1)]
    try:
        app(args=texts, prog_name="paceline")
    finally:
        flush()
