"""Tokenizers small enough to read, built in the test."""

import json
from functools import cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

BOS_ID, EOS_ID = 256, 257
VOCAB_SIZE = 260
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + message.role) }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_ids(text: str | bytes) -> list[int]:
    """Token ids of text in `byte_tokenizer`: one a byte."""
    data = text.encode() if isinstance(text, str) else text
    ids = _ids_of_bytes()
    return [ids[byte] for byte in data]


def byte_tokenizer(*, adds_bos: bool = False) -> Tokenizer:
    """Make a byte-level tokenizer without merges: a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: token_id for token_id, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)]
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS_ID)]
        )
    return tokenizer


def sentencepiece_tokenizer(words: list[str]) -> Tokenizer:
    """Make a tokenizer in Llama 2's style: ▁ for spaces, and bytes for what has no word."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: token_id for token_id, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return tokenizer


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    """Token ids of these entries of a vocabulary."""
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids, tokens
    return ids


def byte_token_ids(tokenizer: Tokenizer, text: str | bytes) -> list[int]:
    """Token ids of text in byte tokens of `sentencepiece_tokenizer`."""
    data = text.encode() if isinstance(text, str) else text
    return ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in data))


def write_tokenizer(
    folder: Path, *, adds_bos: bool = False, template: str | None = TEMPLATE
) -> Path:
    """Write the files that a model's folder has for its tokenizer."""
    byte_tokenizer(adds_bos=adds_bos).save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def _ids_of_bytes() -> list[int]:
    vocab, table = byte_tokenizer().get_vocab(), _byte_table()
    return [vocab[table[byte]] for byte in range(256)]


def _byte_table() -> dict[int, str]:
    # GPT-2's: printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    return table | {byte: chr(256 + number) for number, byte in enumerate(others)}
