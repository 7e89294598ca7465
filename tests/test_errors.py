"""The tree of errors is as drawn, and each error has a status that exists."""

import http
import inspect
import re

import grpc
import pytest

from paceline import errors
from paceline.errors import (
    MAX_MESSAGE_CHARS,
    MAX_VIOLATIONS,
    FieldViolation,
    InvalidRequestError,
    PacelineError,
    QueueFullError,
    clip,
)

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, PacelineError)
]
HTTP_STATUSES = {status.value for status in http.HTTPStatus} | {499}  # nginx's: client went away


def drawn_tree() -> dict[str, str]:
    """Return the parent of each class in the docstring's drawing."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ((?:│   |    )*)(├── |└── )?([A-Z]\w+Error)\b", line)
        if match is None:
            continue
        depth = len(match[1]) // 4 + (match[2] is not None)
        path = [*path[:depth], match[3]]
        parents[match[3]] = path[-2] if depth else "Exception"
    return parents


def test_docstring_draws_every_class_under_its_parent() -> None:
    assert drawn_tree() == {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
def test_error_maps_to_statuses_that_exist(cls: type[PacelineError]) -> None:
    assert cls.grpc_code in grpc.StatusCode.__members__
    assert cls.grpc_code != "OK"
    assert cls.http_status in HTTP_STATUSES
    assert cls.http_status >= 400


@pytest.mark.parametrize("cls", CLASSES)
def test_error_says_when_it_is_raised(cls: type[PacelineError]) -> None:
    assert "__doc__" in vars(cls)
    assert cls.__doc__


def test_invalid_request_names_every_wrong_field() -> None:
    error = InvalidRequestError(FieldViolation("n", "is 0"), FieldViolation("seed", "is -1"))
    assert str(error) == "n: is 0; seed: is -1"
    assert [violation.field for violation in error.violations] == ["n", "seed"]


def test_full_queue_says_when_to_come_back() -> None:
    assert QueueFullError("512 requests wait", retry_after_s=1.5).retry_after_s == 1.5


def test_what_a_client_sent_makes_no_error_longer_than_its_limit() -> None:
    wrong = [FieldViolation("f" * 10_000, "d" * 10_000)] * 100_000
    error = InvalidRequestError(*wrong)
    assert len(error.violations) == MAX_VIOLATIONS
    assert len(str(error)) < MAX_MESSAGE_CHARS + 100
    few = InvalidRequestError(*[FieldViolation("n", "is 0")] * 20)
    assert str(few).endswith("n: is 0; and 4 more")


def test_a_text_that_is_cut_says_how_long_it_was() -> None:
    assert clip("abc", 3) == "abc"
    assert clip("abcd", 3) == "abc… (4 characters)"
