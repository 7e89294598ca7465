"""Text that comes in as bytes: arguments, and what is typed or piped into a command."""

import os
import sys

from paceline.errors import ConfigError


def as_text(given: str, what: str) -> str:
    """Return `given` as text. Python keeps bytes that the locale cannot decode as lone surrogates.

    Raises ConfigError if they are not UTF-8 either.
    """
    try:
        given.encode()
    except UnicodeEncodeError:
        pass
    else:
        return given
    try:
        return os.fsencode(given).decode()
    except UnicodeError as error:
        raise _not_text(what, error) from None


def read_stdin() -> str:
    """Read all of standard input, whatever the locale says, as UTF-8. Raises ConfigError."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise _not_text("standard input", error) from None


def _not_text(what: str, error: UnicodeError) -> ConfigError:
    return ConfigError(f"{what} is not UTF-8 text ({error}). Convert it first, such as with iconv")
