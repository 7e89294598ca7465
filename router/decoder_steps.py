"""What the decoder in tokenizer.json does, as rules that can be followed token by token.

Two families are known: byte-level decoders (GPT-2, Llama 3, Qwen), and those of SentencePiece
models (Llama 2, Mistral, Gemma, T5), which write spaces as ▁ and may spell characters in byte
tokens. A decoder that does anything else is refused: to follow it only in part would give wrong
text.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, cast

from tokenizers import Tokenizer

from paceline.errors import ConfigError


class Replacement(NamedTuple):
    """A string that stands for another one."""

    pattern: str
    content: str
    content_in_first_token: str
    """Metaspace gives the first token of a text no leading space"""

    def apply(self, text: str, *, is_first_token: bool = False) -> str:
        content = self.content_in_first_token if is_first_token else self.content
        return text.replace(self.pattern, content)


@dataclass(frozen=True, slots=True)
class DecoderSteps:
    """How tokens become text. The fields are in the order in which they apply."""

    in_tokens: tuple[Replacement, ...] = ()
    """Applied to each token, before its bytes are looked at"""
    has_byte_tokens: bool = False
    """Whether a token such as <0x0A> is a byte"""
    is_byte_level: bool = False
    """Whether every character of a token stands for a byte"""
    in_text: tuple[Replacement, ...] = ()
    """Applied to text; the patterns are single characters, so no two tokens can share one"""
    stripped: str = " "
    num_stripped: int = 0
    """How often `stripped` is cut from the very beginning of a text, if it is there"""


def read_decoder_steps(tokenizer: Tokenizer) -> DecoderSteps:
    """Read a tokenizer's decoder; raises ConfigError that names what cannot be followed."""
    if tokenizer.decoder is None:
        raise ConfigError(
            "tokenizer.json has no decoder, so nothing says how tokens become text. Save it again "
            "with transformers' tokenizer.save_pretrained, or take another model's folder"
        )
    state = tokenizer.decoder.__getstate__()  # its part of tokenizer.json
    reader = _Reader()
    for step in _flat(json.loads(cast(bytes, state))):
        reader.read(step)
    return reader.result()


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _flat(step)
    else:
        yield decoder


class _Reader:
    """Reads the steps of a decoder one by one, and refuses those whose order would matter."""

    def __init__(self) -> None:
        self._in_tokens: list[Replacement] = []
        self._in_text: list[Replacement] = []
        self._has_byte_tokens = False
        self._is_byte_level = False
        self._is_one_text = False
        """Whether the steps so far have joined the tokens"""
        self._strip: tuple[str, int] | None = None

    def read(self, step: dict[str, Any]) -> None:
        if self._strip is not None and step["type"] != "Fuse":
            _refuse(step, "after Strip")
        match step:
            case {"type": "Fuse"}:
                self._is_one_text = True
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                self._read_replace(step, Replacement(pattern, content, content))
            case {"type": "Metaspace", "replacement": str(pattern), "prepend_scheme": scheme}:
                if self._is_one_text or self._has_byte_tokens:
                    _refuse(step, "after Fuse or ByteFallback")
                in_first = " " if scheme == "never" else ""
                self._in_tokens.append(Replacement(pattern, " ", in_first))
            case {"type": "ByteFallback"}:
                if self._is_one_text:
                    _refuse(step, "after Fuse or ByteLevel")
                self._has_byte_tokens = True
            case {"type": "ByteLevel"}:
                self._read_byte_level(step)
            case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0}:
                if not self._is_one_text:
                    _refuse(step, "before Fuse")
                self._strip = content, start
            case _:
                _refuse(step)

    def result(self) -> DecoderSteps:
        stripped, num_stripped = self._strip or (" ", 0)
        return DecoderSteps(
            tuple(self._in_tokens),
            self._has_byte_tokens,
            self._is_byte_level,
            tuple(self._in_text),
            stripped,
            num_stripped,
        )

    def _read_replace(self, step: dict[str, Any], replacement: Replacement) -> None:
        if self._is_one_text or self._has_byte_tokens:
            if len(replacement.pattern) != 1:
                _refuse(step, "of more than one character after Fuse, ByteFallback or ByteLevel")
            self._in_text.append(replacement)
        elif not replacement.pattern:
            _refuse(step, "of nothing")
        else:
            self._in_tokens.append(replacement)

    def _read_byte_level(self, step: dict[str, Any]) -> None:
        if self._is_byte_level:
            _refuse(step, "after another ByteLevel")
        if self._has_byte_tokens and not self._is_one_text:
            _refuse(step, "after ByteFallback")
        # After a Fuse, one token with a character outside of ByteLevel's alphabet would leave the
        # bytes of all others undecoded. We decode each token by itself there, too.
        self._is_byte_level = self._is_one_text = True
        self._in_tokens += self._in_text
        self._in_text.clear()


def _refuse(step: dict[str, Any], where: str = "") -> NoReturn:
    what = json.dumps(step, ensure_ascii=False)
    raise ConfigError(
        f"the decoder in tokenizer.json has the step {what}{where and ' '}{where}, which paceline "
        "cannot stream. It knows ByteLevel and Metaspace, and Replace (of a string), ByteFallback, "
        "Fuse and a Strip of leading characters in the order of Llama 2's tokenizer. Take a model "
        "whose tokenizer has one of these decoders"
    )
