"""From text or chat messages to token ids, off the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tokenizers import Tokenizer

from paceline.errors import FieldViolation, InvalidRequestError
from paceline.model_files.tokenizer import read_tokenizer
from paceline.router.chat_template import ChatMessage, ChatTemplate, find_chat_template
from paceline.router.detokenize import Detokenizer

T = TypeVar("T")


class PromptTokenizer:
    """Tokenizer and chat template of a model's folder.

    Special tokens around plain text are those of the tokenizer's post-processor; around chat, those
    that the template writes.
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
        """Read the tokenizer and the chat template; raises ConfigError naming what is wrong."""
        read = read_tokenizer(folder)
        source = find_chat_template(folder, read.config)
        names = {role: token.text for role, token in read.roles.items()}
        template = None if source is None else ChatTemplate(source, names)
        return cls(read.tokenizer, template, num_threads)

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
