"""Say what is wrong with settings so that the reader can put it right without another page."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, get_origin

from pydantic import BaseModel

from paceline.cluster.settings import DeploymentSettings, known_keys

MAX_INTEGER = 2**63 - 1
MAX_SECONDS = 2_000_000.0
"""Linux's poll() counts milliseconds in 31 bits: no timer of ours may be longer."""

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


def describe(error: "ValidationError", places: Mapping[str, str], file_name: str) -> str:
    """Turn pydantic's errors into one line each: place, key path, what was given, what is allowed.

    `places` says where each key path was set, such as `local.yaml line 7`.
    """
    by_key: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        by_key.setdefault(_key_path(details), []).append(details)
    return "\n".join(
        f"{_place(key, places, file_name)}: {_problem(key, problems)}"
        for key, problems in by_key.items()
    )


def value_problems(
    settings: Iterable[tuple[str, object]], places: Mapping[str, str], file_name: str
) -> list[str]:
    """Name the values that pydantic takes and no timer, message, memory or path holds."""
    problems: list[str] = []
    for key, value in settings:
        inner = value.items() if isinstance(value, Mapping) else ()
        problems += value_problems(((f"{key}.{k}", v) for k, v in inner), places, file_name)
        if rule := _broken_rule(key, value):
            place = _place(key, places, file_name)
            problems.append(f"{place}: {key} is {value!r}: {rule}{_purpose(key)}")
    return problems


def _broken_rule(key: str, value: object) -> str | None:
    if isinstance(value, str):
        return "must have no zero character" if "\0" in value else None
    largest = MAX_SECONDS if key.endswith("_s") else MAX_INTEGER
    if isinstance(value, int | float) and not value <= largest:  # NaN is refused, too
        return f"must be at most {largest:,}"
    return None


def closest(key: str, keys: list[str]) -> str | None:
    """Find the known key path that someone who typed `key` most likely meant."""
    by_path = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if by_path:
        return by_path[0]
    by_name = {known.rpartition(".")[2]: known for known in reversed(keys)}
    names = difflib.get_close_matches(key.rpartition(".")[2], list(by_name), n=1, cutoff=0.7)
    return by_name[names[0]] if names else None


def _key_path(details: "ErrorDetails") -> str:
    """Join the location, without the parts that pydantic adds for the members of a union."""
    path: list[str] = []
    kind: type[BaseModel] | None = DeploymentSettings
    for part in map(str, details["loc"]):
        if kind is None:
            break
        path.append(part)
        field = kind.model_fields.get(part)
        inner = field.annotation if field is not None else None
        kind = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
        if get_origin(inner) is dict:  # the next part is a key of the user's own
            path.extend(map(str, details["loc"][len(path) : len(path) + 1]))
    return ".".join(path)


def _place(key: str, places: Mapping[str, str], file_name: str) -> str:
    while key:
        if key in places:
            return places[key]
        key = key.rpartition(".")[0]
    return file_name


def _problem(key: str, problems: "list[ErrorDetails]") -> str:
    details = problems[0]
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(key)
    if kind == "missing":
        return f"{key} is missing{_purpose(key)}"
    if kind == "value_error":
        # Our own checks: their text names keys and numbers already.
        return details["msg"].removeprefix("Value error, ")
    # One value may break several rules: those of each member of a union.
    rules = [
        p["msg"].replace("Input should", "must").replace("String should", "must") for p in problems
    ]
    rule = " or ".join(dict.fromkeys(rules))
    return f"{key} is {details['input']!r}: {rule}{_purpose(key)}"


def _unknown_key(key: str) -> str:
    keys = list(known_keys())
    suggestion = closest(key, keys)
    section = key.rpartition(".")[0]
    siblings = ", ".join(
        known.removeprefix(f"{section}.") for known in keys if known.rpartition(".")[0] == section
    )
    hint = f" Did you mean {suggestion}?" if suggestion else ""
    where = f"in {section}" if section else "at the top"
    return f"{key} is not a setting.{hint} Known {where}: {siblings}"


def _purpose(key: str) -> str:
    kind: type[BaseModel] = DeploymentSettings
    text: str | None = None
    for part in key.split("."):
        field = kind.model_fields.get(part)
        if field is None:
            return ""
        text = field.description
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            kind = field.annotation
    return f" ({text.rstrip('.')})" if text else ""
