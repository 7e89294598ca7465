"""Render chat messages by a model's template, with the names that transformers offers templates.

The template is data of the model, so it runs in Jinja's sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paceline.errors import ConfigError, FieldViolation, InvalidRequestError
from paceline.model_files.json_object import read_json_object_if_there


class ChatMessage(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


def find_chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the template for chat, from the first file that has one.

    Raises ConfigError if there are named templates and none is the default.
    """
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return _read_text(own_file)
    template = tokenizer_config.get("chat_template")
    if template is None:
        # Written by processors of several kinds of input, which hold a tokenizer.
        template = read_json_object_if_there(folder / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return template
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    named = _named_templates(template, folder) | {path.stem: _read_text(path) for path in others}
    if named and "default" not in named:
        raise ConfigError(
            f"{folder} has chat templates named {', '.join(sorted(named))}, and none is named "
            "default: which one is for chat is unclear. Save it as chat_template.jinja."
        )
    default = named.get("default")
    return default if isinstance(default, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Download the model again.") from error


def _named_templates(value: object, folder: Path) -> dict[str, Any]:
    """Read several templates: a mapping, or a list of {"name": …, "template": …}."""
    if value is None or isinstance(value, dict):
        return value or {}
    try:
        if not isinstance(value, list):
            raise TypeError(f"it is {type(value).__name__}")
        return {entry["name"]: entry["template"] for entry in value}
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"The chat_template of {folder} cannot be read: {error}. It must be a text, or a list "
            "of objects with name and template."
        ) from error


class _GenerationBlock(Extension):
    """Accept `{% generation %}`, which marks assistant text for training; here it is just text."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled template; raises ConfigError if it does not compile. Safe to use from threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error
        self.source = source
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Return the prompt's text, up to where the assistant begins to speak.

        Raises InvalidRequestError when the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except _REFUSALS as error:
            raise InvalidRequestError(
                FieldViolation("chat.messages", f"the model's chat template refuses them: {error}")
            ) from error


# What a template can raise; a bug in one must fail its request only.
_REFUSALS = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError),
    *(AttributeError, RecursionError),
)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which is wrong in a prompt.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
