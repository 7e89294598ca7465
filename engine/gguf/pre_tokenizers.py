r"""The pre-tokenizers of byte-level BPE vocabularies in GGUF files (`tokenizer.ggml.pre`).

A file names its pre-tokenizer; the regular expressions are llama.cpp's. They are written here for
the engine of the `tokenizers` library so that they split as llama.cpp does, which has rules of its
own:

- Its tables hold Unicode 15.1. Later characters have no category.
- All kinds of letters (`\p{Lu}`, `\p{Lo}`, …) count as letters.
- Several expressions split one after the other, each within the pieces of the one before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, pre_tokenizers

_LATER = (
    r"\x{897}\x{1b4e}-\x{1b4f}\x{1b7f}\x{1c89}-\x{1c8a}\x{2427}-\x{2429}\x{31e4}-\x{31e5}"
    r"\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3}\x{10d40}-\x{10d8f}"
    r"\x{10ec2}-\x{10efc}\x{11380}-\x{113e2}\x{116d0}-\x{116e3}\x{11bc0}-\x{11bf9}\x{11f5a}"
    r"\x{13460}-\x{143fa}\x{16100}-\x{16139}\x{16d40}-\x{16d79}\x{18cff}\x{1cc00}-\x{1ceb3}"
    r"\x{1e5d0}-\x{1e5ff}\x{1f8b2}-\x{1f8c1}\x{1fa89}-\x{1fa8f}\x{1fabe}\x{1fac6}"
    r"\x{1fadc}-\x{1fadf}\x{1fae9}\x{1fbcb}-\x{1fbef}"
)
"""What has a category in the engine's Unicode 16 and has none in llama.cpp's 15.1."""


def character_class(category: str) -> str:
    """Return the expression for one character of a Unicode category, as llama.cpp knows it."""
    return rf"[\p{{{category}}}&&[^{_LATER}]]"


_N = character_class("N")
_L = character_class("L")
_M = character_class("M")
_P = character_class("P")
_S = character_class("S")

_CONTRACTION = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LEAD = rf"[^\r\n{_L}{_N}]?"
"""One character in front of a word, such as the space."""
_SYMBOLS = rf" ?[^\s{_L}{_N}]+[\r\n]*"
_SYMBOLS_OR_PATH = rf" ?[^\s{_L}{_N}]+[\r\n/]*"

_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+| ?{_N}+| ?[^\s{_L}{_N}]+|\s+(?!\S)|\s+"
# Each digit first, then GPT-2's expression between them: written as one, for it is the faster.
_DIGIT_THEN_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_L}+|{_N}| ?[^\s{_L}{_N}]+|\s+(?![^\s{_N}])|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_LEAD}{_L}+|{_N}{{1,3}}|{_SYMBOLS}|{_BLANKS}"
_QWEN2 = rf"{_CONTRACTION}|{_LEAD}{_L}+|{_N}|{_SYMBOLS}|{_BLANKS}"
_QWEN35 = rf"{_CONTRACTION}|{_LEAD}[{_L}{_M}]+|{_N}| ?[^\s{_L}{_M}{_N}]+[\r\n]*|{_BLANKS}"
_JAIS2 = (
    rf"{_CONTRACTION}|{_LEAD}{_L}+|{_N}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+|"
    + "|".join(rf"\s{{{num}}}(?!\S)" for num in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s"
)
_EXAONE_MOE = (
    rf"{_CONTRACTION}|{_LEAD}(?:{_L}{_M}*(?: {_L}{_M}*)*)+|{_N}"
    rf"| ?[^\s{_L}{_N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BAILING = (
    rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_LEAD}{_L}+|{_N}|{_SYMBOLS}"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SEED_CODER = rf"{_CONTRACTION}|{_LEAD}{_L}+|{_N}| ?[^\s{_L}{_N}\r\n]+|{_BLANKS}"
_UFAKZEKA = rf"{_LEAD}{_L}+|{_N}|{_SYMBOLS}|{_BLANKS}"
_MINICPM5 = rf"{_CONTRACTION}|{_LEAD}{_L}+|{_N}+|{_SYMBOLS}|{_BLANKS}"
_BLOOM = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{964}\x{6d4}\x{60c})]+"


def _cased_words(letter: str, contraction: str) -> str:
    """Match words that begin again at each capital. Only A-Z and a-z have a case here."""
    upper, lower = f"[{letter}&&[^a-z]]", f"[{letter}&&[^A-Z]]"
    return f"{_LEAD}{upper}*{lower}+{contraction}|{_LEAD}{upper}+{lower}*{contraction}"


_TEKKEN = rf"{_cased_words(_L, '')}|{_N}|{_SYMBOLS_OR_PATH}|{_BLANKS}"
_GPT4O = rf"{_cased_words(_L, f'(?:{_CONTRACTION})?')}|{_N}{{1,3}}|{_SYMBOLS_OR_PATH}|{_BLANKS}"
_GRANITE_MULTILINGUAL = (
    rf"{_cased_words(f'[{_L}{_M}]', f'(?:{_CONTRACTION})?')}"
    rf"|{_N}{{1,3}}|{_SYMBOLS_OR_PATH}|{_BLANKS}"
)
_MARKED_WORDS = rf"{_LEAD}[{_L}{_M}]+(?:{_CONTRACTION})?"
_YOUTU = rf"{_MARKED_WORDS}|{_N}|{_SYMBOLS_OR_PATH}|{_BLANKS}"
_TINY_AYA = rf"{_MARKED_WORDS}|{_N}{{1,3}}|{_SYMBOLS_OR_PATH}|{_BLANKS}"

_NOT_HAN = (
    rf"[{_L}&&[^\x{{3400}}-\x{{4dbf}}\x{{4e00}}-\x{{9fff}}\x{{f900}}-\x{{faff}}"
    r"\x{20000}-\x{2a6df}\x{2a700}-\x{2ebef}\x{2f800}-\x{2fa1f}]]"
)
_KIMI = (
    r"[\x{3400}-\x{4dbf}\x{4e00}-\x{9fff}\x{f900}-\x{faff}"
    r"\x{20000}-\x{2a6df}\x{2a700}-\x{2ebef}\x{2f800}-\x{2fa1f}]+"
    rf"|{_LEAD}{_NOT_HAN}+(?:{_CONTRACTION})?|{_N}{{1,3}}|{_SYMBOLS}|{_BLANKS}"
)

_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    rf"|[^\r\n{_L}{_P}{_S}]?[{_L}{_M}]+| ?[{_P}{_S}]+"
)
_DEEPSEEK3 = rf"{_DEEPSEEK_WORDS}[\r\n]*|{_BLANKS}"
_SPARK = rf"{_DEEPSEEK_WORDS}|[\r\n]|\s+(?!\S)|\s+"
_CJK = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
# Up to the ideographs, and Hangul. The first range spans blanks, which llama.cpp never finds in it.
_DEEPSEEK_CJK = r"[[\x{800}-\x{9fa5}\x{ac00}-\x{d7ff}]&&\S]+"
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}"
    r"\x{1c4}-\x{293}\x{295}-\x{2af}\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}"
    r"\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}\x{3f7}-\x{481}"
    r"\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}"
    r"\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}"
    r"\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}"
    r"\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}\x{1f5d}\x{1f5f}-\x{1f7d}"
    r"\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}"
    r"\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}"
    r"\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}"
    r"\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}"
    r"\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}"
    r"\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}"
    r"\x{a771}-\x{a787}\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}"
    r"\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}"
    r"\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}"
    r"\x{118a0}-\x{118df}\x{1e900}-\x{1e943}]+"
)
_DEEPSEEK_PUNCTUATION = (
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3001}\x{3002}]+"
)

# Digits in threes, counted from the right. What stands before them belongs to the first group.
_DIGITS_FROM_RIGHT = (
    rf"(?<={_N}){_N}{{3}}|[^{_N}]*+{_N}{{1,3}}(?=(?:{_N}{{3}})*+(?!{_N}))|[^{_N}]++\z"
)
_AFMOE_CJK = (
    r"[\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{8c48}-\x{faff}\x{3040}-\x{309f}"
    r"\x{30a0}-\x{30ff}\x{ff65}-\x{ff9f}\x{2f00}-\x{2fdf}\x{e40}-\x{e7f}\x{e80}-\x{eff}"
    r"\x{1780}-\x{17ff}\x{1000}-\x{109f}\x{aa60}-\x{aa7f}\x{a9e0}-\x{a9ff}"
    r"\x{1100}-\x{11ff}]+"
)
_YOUTU_CJK = (
    r"[\x{ac00}-\x{d7a3}\x{3131}-\x{318e}]+|[\x{ff01}\x{2026}\x{201c}\x{201d}\x{2018}"
    r"\x{2019}\x{2014}\x{ff1a}\x{ff1b}\x{ff0c}\x{3001}-\x{303f}\x{fe30}-\x{fe4f}]+|["
    r"\x{3105}-\x{312f}]+|[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
)

_DEEPSEEK3_SPLITS = (rf"{_N}{{1,3}}", _CJK, _DEEPSEEK3)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text becomes words, and what else llama.cpp derives from the pre-tokenizer's name."""

    splits: tuple[str, ...]
    """Regular expressions; each isolates its matches within the pieces of the one before."""
    ignore_merges: bool = False
    """A word that is a token stays whole, whatever the merges say."""
    add_bos: bool = False
    """Default of tokenizer.ggml.add_bos_token."""
    add_sep: bool = False
    """Default of tokenizer.ggml.add_sep_token."""
    strips_before_mask: bool = False
    """llama.cpp drops blanks before the token <mask>."""
    needs_merges: bool = True

    def build(self) -> list[pre_tokenizers.PreTokenizer]:
        """Build the steps from a text to its words, still as characters."""
        return [pre_tokenizers.Split(Regex(split), "isolated") for split in self.splits]


_FAMILIES: Mapping[str, PreTokenizer] = {
    (
        "a.x-4.0 exaone4 gigachat gpt-2 granite-docling jais jina-de jina-es mellum "
        "modern-bert mpt olmo phi-2 trillion"
    ): PreTokenizer((_GPT2,)),
    "afmoe": PreTokenizer((_DIGITS_FROM_RIGHT, _AFMOE_CJK, _DEEPSEEK3)),
    "bailingmoe bailingmoe2 llada-moe": PreTokenizer((_BAILING,)),
    "bloom gpt3-finnish poro-chat": PreTokenizer((_BLOOM,)),
    "chameleon": PreTokenizer(
        (
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            _N,
            rf"[{_P}!-/:-@\[-`{{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "chatglm-bpe dbrx glm4 smaug-bpe": PreTokenizer((_LLAMA3,)),
    "codeshell command-r exaone mellum2 minerva-7b refact smollm starcoder": PreTokenizer(
        (_DIGIT_THEN_GPT2,)
    ),
    "cohere2moe tiny_aya": PreTokenizer((_DIGITS_FROM_RIGHT, _TINY_AYA)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", rf"\s?{_L}+", rf"\s?{_P}+", _DEEPSEEK_CJK, _N)),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            _DEEPSEEK_LETTERS,
            _DEEPSEEK_PUNCTUATION,
            r"(?<!\s)\s+\z",
            _DEEPSEEK_CJK,
            rf"{_N}+",
        )
    ),
    "deepseek-r1-qwen f2llmv2 grok-2 hunyuan kormo megrez qwen2 solar-open stablelm2": PreTokenizer(
        (_QWEN2,)
    ),
    "deepseek-v3 hunyuan-dense hy_v4 joyai-llm": PreTokenizer(_DEEPSEEK3_SPLITS),
    "default": PreTokenizer((rf"[{_P}$+<=>^~|]+", _GPT2, rf"{_N}+", "[0-9][0-9][0-9]")),
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "falcon": PreTokenizer((rf"[{_P}$+<=>^~|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "falcon-h1 falcon3 jina-v5-nano lfm2 llama-bpe llama-v3 llama3 midm-2.0 pixtral": PreTokenizer(
        (_LLAMA3,), ignore_merges=True, add_bos=True
    ),
    "gpt-4o kanana2 llama4 minimax-m2 talkie": PreTokenizer((_GPT4O,)),
    "granite-embed-multi-97m": PreTokenizer((_GRANITE_MULTILINGUAL,), ignore_merges=True),
    "jais-2": PreTokenizer((_JAIS2,)),
    "jina-v1-en roberta-bpe": PreTokenizer((_GPT2,), add_sep=True),
    "jina-v2-code": PreTokenizer((_GPT2,), add_sep=True, strips_before_mask=True),
    "jina-v2-de jina-v2-es": PreTokenizer((_GPT2,), strips_before_mask=True),
    "kimi-k2": PreTokenizer((_KIMI,), needs_merges=False),
    "laguna": PreTokenizer((r"[^\n]+|\n+", _QWEN2)),
    "minicpm5": PreTokenizer((rf"{_N}{{1,3}}", _MINICPM5), ignore_merges=True),
    "qwen35": PreTokenizer((_QWEN35,)),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "spark2_5": PreTokenizer((rf"{_N}{{1,3}}", _CJK, _SPARK, _N)),
    "superbpe": PreTokenizer((rf"{_N}+", r"(?=(?:[0-9]{3})+(?![0-9]))")),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "ufakzeka": PreTokenizer((_UFAKZEKA,)),
    "viking": PreTokenizer((_BLOOM, _N)),
    "youtu": PreTokenizer((_YOUTU_CJK, _YOUTU), ignore_merges=True),
}
"""Each by all names that llama.cpp has for it."""

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    dict(sorted((name, made) for names, made in _FAMILIES.items() for name in names.split()))
)

REFUSED_PRE_TOKENIZERS: Mapping[str, str] = MappingProxyType(
    {
        "gemma4": "it splits at line breaks only and has byte tokens, as SentencePiece does",
        "granite-embed-multi-311m": "it is gemma4's",
        "sarvam-moe": "it splits at line breaks only and has byte tokens, as SentencePiece does",
        "whitespace": "it drops blanks, so that its tokens do not give the text back",
    }
)
"""What llama.cpp knows and paceline does not, with the reason."""
