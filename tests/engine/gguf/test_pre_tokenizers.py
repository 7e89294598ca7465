import pytest
from tokenizers import Regex, pre_tokenizers

from paceline.engine.gguf.pre_tokenizers import (
    PRE_TOKENIZERS,
    REFUSED_PRE_TOKENIZERS,
    PreTokenizer,
    character_class,
)

# Behind them come Chinese characters, and little else.
FIRST_TWO_PLANES = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x20000))))


def split(pre_tokenizer: PreTokenizer, text: str) -> list[str]:
    steps = pre_tokenizers.Sequence(pre_tokenizer.build())
    return [word for word, _ in steps.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("category", "num_characters"),
    [("N", 1831), ("L", 66100), ("M", 2210), ("P", 842), ("S", 7775)],
)
def test_a_category_has_the_characters_of_llama_cpp_whatever_the_engine_s_unicode(
    category: str, num_characters: int
) -> None:
    others = pre_tokenizers.Split(Regex(f"[^{character_class(category)}]+"), "removed")
    found = sum(len(piece) for piece, _ in others.pre_tokenize_str(FIRST_TWO_PLANES))
    assert found == num_characters


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_words_of_a_text_are_the_text(name: str) -> None:
    text = "Ab  12345 it's\r\n\t (é\u0301) 世界٣ \u3000\U00016d50 "
    assert "".join(split(PRE_TOKENIZERS[name], text)) == text


def test_nothing_is_both_implemented_and_refused() -> None:
    assert not PRE_TOKENIZERS.keys() & REFUSED_PRE_TOKENIZERS.keys()


def test_digits_are_grouped_from_the_right_and_the_first_group_keeps_what_is_before_it() -> None:
    digits = PreTokenizer(PRE_TOKENIZERS["afmoe"].splits[:1])
    assert split(digits, "ab1234567c12d123") == ["ab1", "234", "567", "c12", "d123"]
    assert split(digits, "no digits") == ["no digits"]


def test_blanks_take_time_in_proportion_to_their_number() -> None:
    text = " " * 100_000 + "x"  # minutes, if the time grew with the square
    assert "".join(split(PRE_TOKENIZERS["deepseek-llm"], text)) == text
