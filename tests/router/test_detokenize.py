import itertools
import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import (
    EOS_ID,
    byte_ids,
    byte_token_ids,
    byte_tokenizer,
    ids_of,
    sentencepiece_tokenizer,
)
from tokenizers import AddedToken, Tokenizer, decoders

from paceline.router.detokenize import Detokenizer, TokenDecoder

REPLACE = decoders.Replace("▁", " ")
BYTES, FUSE, STRIP = decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
SEPARATOR = "|separator|"
WORDS = ["▁Hello", "▁world", "▁", "▁▁▁", "x", "é", "日本", "a▁b", "�", ""]


def byte_level() -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["Ġword", "x y", "é", "naïve✓", "ðŁ", "ĺĢĺ", "âĤ¬âĤ", "âĤ¬"])
    return tokenizer


def sequence_of_byte_level(*steps: decoders.Decoder) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *steps])
    return tokenizer


def sentencepiece(*steps: decoders.Decoder) -> Tokenizer:
    tokenizer = sentencepiece_tokenizer(WORDS)
    tokenizer.add_tokens(["<tool> ▁", AddedToken("▁tool", normalized=False)])
    tokenizer.add_tokens([AddedToken(SEPARATOR, normalized=False)])
    if steps:
        tokenizer.decoder = decoders.Sequence(list(steps))
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace("▁", scheme)
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level in a sequence": sequence_of_byte_level(FUSE, decoders.Replace("€", "E"), STRIP),
    "Llama 2": sentencepiece(),
    "Llama 2 from GGUF": sentencepiece(BYTES, FUSE, REPLACE, STRIP),
    "Gemma": sentencepiece(REPLACE, BYTES, FUSE),
    "without byte tokens": sentencepiece(REPLACE),
    "T5": metaspace("always"),
    "Metaspace that prepends nothing": metaspace("never"),
    "Metaspace and byte tokens": sentencepiece(decoders.Metaspace(), BYTES, FUSE),
}


def pieces_of(tokenizer: Tokenizer, output: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    """Return what each output token adds, and the rest at the end."""
    detokenizer = Detokenizer(tokenizer)
    decoder = TokenDecoder(detokenizer, continues_text=detokenizer.has_text(prompt))
    return [*(decoder.push(token_id) for token_id in output), decoder.flush()]


def reference(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Decode at once, but cut broken runs of byte tokens, so that their whole characters stay."""
    return tokenizer.decode(list(_cut_broken_runs(tokenizer, token_ids))).replace(SEPARATOR, "")


def _cut_broken_runs(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[int]:
    def byte_of(token_id: int) -> int | None:
        match = re.fullmatch("<0x(..)>", tokenizer.id_to_token(token_id))
        return int(match[1], 16) if match else None

    if "ByteFallback" not in str(tokenizer.decoder):
        return list(token_ids)
    (separator,) = ids_of(tokenizer, SEPARATOR)
    special = ids_of(tokenizer, "<s>", "</s>")
    kept = [
        token_id
        for token_id in token_ids
        if tokenizer.id_to_token(token_id) is not None and token_id not in special
    ]
    result: list[int] = []
    for is_run, group in itertools.groupby(kept, lambda token_id: byte_of(token_id) is not None):
        ids = list(group)
        if not is_run:
            result += ids
            continue
        data = bytes(byte for token_id in ids if (byte := byte_of(token_id)) is not None)
        for number, part in enumerate([data] if _is_text(data) else _characters(data)):
            result += [separator] * (number > 0) + byte_token_ids(tokenizer, part)
    return result


def _characters(data: bytes) -> list[bytes]:
    parts = []
    while data:
        size = next((n for n in range(1, 5) if _is_text(data[:n])), 1)
        parts.append(data[:size])
        data = data[size:]
    return parts


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def any_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Lists of ids: single tokens of all kinds, and characters in byte tokens, whole and broken."""
    size = tokenizer.get_vocab_size()
    spell = byte_ids if "<0x00>" not in tokenizer.get_vocab() else _speller(tokenizer)
    broken = [
        character.encode()[start:end]
        for character in ("é", "€", "😀", "▁", "a€")
        for start in range(2)
        for end in range(start + 1, 5)
    ]
    separator = tokenizer.token_to_id(SEPARATOR)  # the reference's own
    part = st.one_of(
        st.integers(256, size + 2),  # words, added and special tokens, and ids beyond them
        st.integers(0, size),
        st.sampled_from([tuple(spell(data)) for data in broken]),
    )
    return st.lists(part.filter(lambda token_id: token_id != separator), max_size=8).map(_flat)


def _speller(tokenizer: Tokenizer) -> Callable[[bytes], list[int]]:
    return lambda data: byte_token_ids(tokenizer, data)


def _flat(parts: list[int | tuple[int, ...]]) -> list[int]:
    return [id_ for part in parts for id_ in (part if isinstance(part, tuple) else (part,))]


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_text_is_that_of_all_tokens_decoded_at_once(family: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[family]
    ids = any_ids(tokenizer)
    prompt, output = data.draw(ids), data.draw(ids)
    alone = pieces_of(tokenizer, output)
    assert "".join(alone) == reference(tokenizer, output)
    word = ids_of(tokenizer, "x")
    after_a_word = pieces_of(tokenizer, output, word)
    assert "x" + "".join(after_a_word) == reference(tokenizer, word + output)
    has_text = Detokenizer(tokenizer).has_text(prompt)
    assert pieces_of(tokenizer, output, prompt) == (after_a_word if has_text else alone)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_text_is_the_same_when_every_byte_is_a_token(text: str) -> None:
    assert "".join(pieces_of(TOKENIZERS["byte-level"], byte_ids(text))) == text
    tokenizer = TOKENIZERS["Gemma"]
    assert "".join(pieces_of(tokenizer, byte_token_ids(tokenizer, text))) == text


def test_character_split_over_tokens_comes_out_whole() -> None:
    pieces = pieces_of(TOKENIZERS["byte-level"], byte_ids("aé€😀z"))
    assert [piece for piece in pieces if piece] == ["a", "é", "€", "😀", "z"]


def test_incomplete_character_at_the_end_is_replaced() -> None:
    pieces = pieces_of(TOKENIZERS["byte-level"], byte_ids("ab") + byte_ids("😀")[:2])
    assert pieces == ["a", "b", "", "", "�"]


def test_prompt_that_ends_inside_a_character_leaves_nothing_of_itself_in_the_text() -> None:
    prompt = byte_ids("Secret ") + byte_ids("🌶".encode()[:2])
    output = byte_ids("🌶".encode()[2:] + b"k")
    assert "".join(pieces_of(TOKENIZERS["byte-level"], output, prompt)) == "��k"
    tokenizer = TOKENIZERS["Llama 2"]
    prompt = ids_of(tokenizer, "▁Hello") + byte_token_ids(tokenizer, b"\xf0\x9f")
    output = byte_token_ids(tokenizer, b"\x8c") + ids_of(tokenizer, "▁world")
    assert "".join(pieces_of(tokenizer, output, prompt)) == "� world"


def test_space_before_the_first_word_is_kept_after_any_text() -> None:
    tokenizer = TOKENIZERS["Llama 2"]
    output = ids_of(tokenizer, "▁Hello", "▁world")
    prompts = [ids_of(tokenizer, "x"), ids_of(tokenizer, "▁"), byte_token_ids(tokenizer, "🌶早")]
    for prompt in prompts:
        assert "".join(pieces_of(tokenizer, output, prompt)) == " Hello world"
    assert "".join(pieces_of(tokenizer, output, ids_of(tokenizer, "<s>"))) == "Hello world"


def test_broken_run_of_byte_tokens_keeps_its_characters_and_the_next_words_space() -> None:
    tokenizer = TOKENIZERS["Llama 2"]
    output = byte_token_ids(tokenizer, "é".encode() + b"\xc3") + ids_of(tokenizer, "▁world")
    assert pieces_of(tokenizer, output, ids_of(tokenizer, "x")) == ["", "é", "", "� world", ""]


def test_special_tokens_and_ids_beyond_the_vocabulary_have_no_text() -> None:
    output = [*byte_ids("a"), EOS_ID, 100_000, *byte_ids("b")]
    assert "".join(pieces_of(TOKENIZERS["byte-level"], output)) == "ab"


def test_special_token_that_is_normalized_has_no_text_either() -> None:
    tokenizer = sentencepiece()
    tokenizer.add_special_tokens([AddedToken("<end>", normalized=True)])
    output = ids_of(tokenizer, "▁Hello", "<end>", "▁world")
    assert "<end>" in tokenizer.decode(output, skip_special_tokens=True)  # tokenizers shows it
    assert "".join(pieces_of(tokenizer, output)) == "Hello world"


def test_token_without_text_inside_a_character_does_not_break_it() -> None:
    first, second = byte_ids("é")
    assert "".join(pieces_of(TOKENIZERS["byte-level"], [first, EOS_ID, 100_000, second])) == "é"


@pytest.mark.parametrize(
    "pattern",
    [
        byte_ids("😀")[:1],
        byte_ids("😀")[:3],
        byte_ids("😀")[1:2],
        [EOS_ID],
        [100_000],
        [EOS_ID, *byte_ids("😀")[:2], 100_000],
    ],
)
def test_tokens_that_complete_no_character_cost_what_others_do(pattern: list[int]) -> None:
    num_tokens = 32_768
    detokenizer = Detokenizer(TOKENIZERS["byte-level"])
    decoder = TokenDecoder(detokenizer, continues_text=True)
    num_characters = 0
    for token_id in itertools.islice(itertools.cycle(pattern), num_tokens):
        num_characters += len(decoder.push(token_id))
        assert decoder.num_pending_bytes <= 3
    assert num_characters <= num_tokens
    assert detokenizer.piece.cache_info().misses == len(set(pattern))
