"""From text or chat messages to token ids, without holding up the event loop."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paceline.errors import FieldViolation, InvalidRequestError
from paceline.request import TokenIds
from paceline.router.chat_template import ChatMessage
from paceline.router.settings import RouterSettings
from paceline.router.tokenize import PromptTokenizer
from paceline.router.tokenizer_child import Frame, FrameKind, Limits, chat_frame
from paceline.router.tokenizer_pool import TokenizerPool

SHORT_TEXT_BYTES = 4096
"""Tokenized in the event loop, in 2 ms at most: a process costs more than that saves."""
LONG_TEXT_BYTES = 64 << 10
"""Takes a tenth of a second, or seconds. Longer prompts have a process of their own, so that they
never delay others."""
MAX_WAITING_PROMPTS = 1024
MAX_WAITING_LONG_PROMPTS = 32
"""Each may be as large as a request."""


class PromptEncoder:
    """The model's tokenizer and its processes."""

    def __init__(self, folder: Path, settings: RouterSettings, max_model_len: int) -> None:
        """Read the model's files; raises ConfigError naming what is missing."""
        self._tokens = PromptTokenizer.from_folder(folder)
        self.detokenizer = self._tokens.detokenizer
        self._max_model_len = max_model_len
        self._longest_token = max(len(t.encode()) for t in self._tokens.tokenizer.get_vocab())
        self._set_text_bytes = settings.max_text_bytes
        self._max_text_bytes = settings.max_text_bytes or max_model_len * self._longest_token
        limits = Limits(self._max_text_bytes, settings.tokenizer_timeout_s)
        digest = self._tokens.digest()
        self._pool = TokenizerPool(
            folder,
            digest,
            limits,
            num_processes=settings.tokenizer_processes - 1,
            max_waiting=MAX_WAITING_PROMPTS,
        )
        self._long_pool = TokenizerPool(
            folder, digest, limits, num_processes=1, max_waiting=MAX_WAITING_LONG_PROMPTS
        )

    @property
    def has_chat_template(self) -> bool:
        return self._tokens.has_chat_template

    async def start(self) -> None:
        """Start the processes; otherwise the first call of each does."""
        await self._pool.start()
        await self._long_pool.start()

    async def encode_text(self, text: str) -> TokenIds:
        """Tokenize plain text with the model's special tokens."""
        data = text.encode()
        self._check_length(len(data), "text")
        if len(data) <= SHORT_TEXT_BYTES:
            return np.array(self._tokens.encode_text(text), dtype=np.int32)
        return await self._pool_for(len(data)).encode(Frame(FrameKind.TEXT, data))

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> TokenIds:
        """Render and tokenize a conversation; raises InvalidRequestError if it cannot be
        rendered."""
        self._tokens.check_chat(messages)
        frame = chat_frame(messages)
        num_bytes = sum(len(m.role.encode()) + len(m.content.encode()) for m in messages)
        self._check_length(num_bytes, "chat.messages")
        return await self._pool_for(len(frame.payload)).encode(frame)

    async def close(self) -> None:
        await self._pool.close()
        await self._long_pool.close()

    def _pool_for(self, num_bytes: int) -> TokenizerPool:
        return self._long_pool if num_bytes > LONG_TEXT_BYTES else self._pool

    def _check_length(self, num_bytes: int, field: str) -> None:
        if num_bytes <= self._max_text_bytes:
            return
        why = (
            f"router.max_text_bytes is {self._set_text_bytes}"
            if self._set_text_bytes
            else f"model.max_model_len is {self._max_model_len} tokens, the longest of which has "
            f"{self._longest_token} bytes"
        )
        raise InvalidRequestError(
            FieldViolation(
                field,
                f"has {num_bytes} bytes of text, at most {self._max_text_bytes} can fit: {why}",
            )
        )
