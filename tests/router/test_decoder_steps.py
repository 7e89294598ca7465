import pytest
from tiny_tokenizer import byte_tokenizer
from tokenizers import Regex, Tokenizer, decoders

from paceline.errors import ConfigError
from paceline.router.decoder_steps import read_decoder_steps
from paceline.router.detokenize import Detokenizer, TokenDecoder

REPLACE = decoders.Replace("▁", " ")
BYTES, FUSE, STRIP = decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
BYTE_LEVEL, METASPACE = decoders.ByteLevel(), decoders.Metaspace()


def with_decoder(*steps: decoders.Decoder) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = steps[0] if len(steps) == 1 else decoders.Sequence(list(steps))
    return tokenizer


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        ([decoders.WordPiece()], "WordPiece"),
        ([decoders.BPEDecoder()], "BPEDecoder"),
        ([decoders.CTC()], "CTC"),
        ([decoders.Replace(Regex("▁+"), " ")], "Regex"),
        ([REPLACE, FUSE, decoders.Strip(" ", 0, 1)], "Strip"),
        ([REPLACE, STRIP], "Strip.*before Fuse"),
        ([FUSE, STRIP, REPLACE], "Replace.*after Strip"),
        ([FUSE, decoders.Replace("ab", "c")], "Replace.*more than one character after Fuse"),
        ([BYTES, decoders.Replace("ab", "c")], "Replace.*more than one character after Fuse"),
        ([decoders.Replace("", " ")], "Replace.*of nothing"),
        ([FUSE, BYTES], "ByteFallback.*after Fuse"),
        ([FUSE, METASPACE], "Metaspace.*after Fuse"),
        ([BYTES, METASPACE], "Metaspace.*after Fuse or ByteFallback"),
        ([BYTE_LEVEL, BYTE_LEVEL], "ByteLevel.*after another"),
        ([BYTES, BYTE_LEVEL], "ByteLevel.*after ByteFallback"),
        ([decoders.Sequence([decoders.Sequence([decoders.WordPiece()])])], "WordPiece"),
    ],
)
def test_decoder_that_cannot_be_followed_is_refused_by_name(
    steps: list[decoders.Decoder], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"the step .*{named}.*It knows ByteLevel"):
        read_decoder_steps(with_decoder(*steps))


def test_tokenizer_without_decoder_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.decoder = None
    with pytest.raises(ConfigError, match="no decoder"):
        read_decoder_steps(tokenizer)


def test_byte_level_behind_other_steps_decodes_each_token_by_itself() -> None:
    # transformers 4 wrote this for Llama 3 from GGUF. With `tokenizers`, the added token would
    # leave every Ġ of the text as it is.
    tokenizer = with_decoder(BYTES, FUSE, REPLACE, BYTE_LEVEL)
    tokenizer.add_tokens(["x y", "Ġz", "a▁b"])
    decoder = TokenDecoder(Detokenizer(tokenizer), continues_text=True)
    ids = [tokenizer.token_to_id(token) for token in ("Ġz", "x y", "Ġz", "a▁b")]
    assert "".join(map(decoder.push, ids)) == " zx y za b"
