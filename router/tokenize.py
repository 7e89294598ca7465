"""From text or chat messages to token ids, off the event loop."""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from paceline.errors import ConfigError, FieldViolation, InvalidRequestError
from paceline.router.chat_template import ChatMessage, ChatTemplate
from paceline.router.detokenize import Detokenizer

T = TypeVar("T")

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class PromptTokenizer:
    """Tokenizer and chat template of a model's folder.

    Special tokens around plain text are those of the post-processor in tokenizer.json; around
    chat, those that the template writes.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, num_threads: int
    ) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self._tokenizer = tokenizer
        self._template = template
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")

    @classmethod
    def from_folder(cls, folder: Path, num_threads: int) -> "PromptTokenizer":
        """Read tokenizer.json and the chat template; raises ConfigError naming what is missing."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder} has no tokenizer.json, which the router needs to turn text into tokens; "
                "save it with transformers' tokenizer.save_pretrained, or correct model.path"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower class
            raise ConfigError(f"{path} is not a tokenizer that can be read: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, _read_template(folder), num_threads)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    async def encode_text(self, text: str) -> list[int]:
        """Tokenize plain text with the model's special tokens."""
        return await self._in_thread(lambda: self._encode(text, "text", special=True))

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Render and tokenize a conversation; raises InvalidRequestError if it cannot be
        rendered."""
        template = self._template
        if template is None:
            raise InvalidRequestError(
                FieldViolation("chat", "the model has no chat template; send text or token_ids")
            )
        if not messages:
            raise InvalidRequestError(
                FieldViolation("chat.messages", "is empty; at least one message is needed")
            )
        return await self._in_thread(
            lambda: self._encode(template.render(messages), "chat.messages", special=False)
        )

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _encode(self, text: str, field: str, *, special: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        except Exception as error:  # tokenizers raises no narrower class
            raise InvalidRequestError(
                FieldViolation(field, f"cannot be tokenized: {error}")
            ) from error

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _read_template(folder: Path) -> ChatTemplate | None:
    config = _read_config(folder / "tokenizer_config.json")
    separate = folder / "chat_template.jinja"
    source = separate.read_text() if separate.is_file() else _default_template(config)
    if source is None:
        return None
    tokens = {name: _token_text(config.get(name)) for name in _SPECIAL_TOKENS}
    return ChatTemplate(source, {name: text for name, text in tokens.items() if text is not None})


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return config


def _default_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    # Either the text, or an added token as {"content": text, ...}.
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
