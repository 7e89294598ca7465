import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import EOS_ID, byte_ids, byte_tokenizer

from paceline.router.detokenize import Detokenizer
from paceline.router.text_stream import TextStream

TOKENIZER = byte_tokenizer()
DETOKENIZER = Detokenizer(TOKENIZER)


def make_stream(*stop: str, min_tokens: int = 0, silent: tuple[int, ...] = ()) -> TextStream:
    return TextStream(
        DETOKENIZER, continues_text=True, stop=stop, silent=silent, min_tokens=min_tokens
    )


def push_all(stream: TextStream, token_ids: list[int]) -> tuple[list[str], int | None]:
    """Return the pieces of text, and how many tokens there were when a stop string was complete."""
    pieces = []
    for count, token_id in enumerate(token_ids, 1):
        found = stream.push(token_id)
        pieces.append(stream.take())
        if found:
            return pieces, count
    stream.flush()
    pieces.append(stream.take())
    return pieces, None


def test_special_and_silent_tokens_have_no_text() -> None:
    silent = byte_ids("!")[0]
    pieces, _ = push_all(make_stream(silent=(silent,)), [*byte_ids("a!b"), EOS_ID])
    assert "".join(pieces) == "ab"


def test_stop_string_over_token_borders_is_cut_from_the_text() -> None:
    pieces, count = push_all(make_stream("STOP"), byte_ids("go on STOP now"))
    assert "".join(pieces) == "go on "
    assert count == len("go on STOP")


def test_text_that_could_begin_a_stop_string_is_held_back_and_let_go_when_it_does_not() -> None:
    stream = make_stream("STOP")
    pieces, _ = push_all(stream, byte_ids("aSTOxST"))
    assert pieces[:5] == ["a", "", "", "", "STOx"]
    assert pieces[-1] == "ST"


def test_earliest_of_several_stop_strings_wins() -> None:
    pieces, count = push_all(make_stream("ab", "b", "cd"), byte_ids("xxabcd"))
    assert "".join(pieces) == "xx"
    assert count == 4


def test_stop_string_made_of_a_split_character_is_found() -> None:
    pieces, count = push_all(make_stream("€"), byte_ids("5€ please"))
    assert "".join(pieces) == "5"
    assert count == 4


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    pieces, count = push_all(make_stream("b", min_tokens=2), byte_ids("abab"))
    assert "".join(pieces) == "aba"
    assert count == 4


@pytest.mark.parametrize("stop", ["aab", "aaab"])
def test_repeated_beginnings_of_a_stop_string_are_not_missed(stop: str) -> None:
    pieces, count = push_all(make_stream(stop), byte_ids("aaaab"))
    assert "".join(pieces) == "aaaab".removesuffix(stop)
    assert count == 5


def test_stop_string_that_ends_in_an_incomplete_character_is_cut_at_the_end() -> None:
    output = byte_ids(b"ab\xe2\x82")
    for min_tokens, wanted in ((0, (True, "a")), (4, (False, "ab�"))):
        stream = make_stream("b�", min_tokens=min_tokens)
        assert not any(map(stream.push, output))
        assert (stream.flush(), stream.take()) == wanted


@settings(deadline=None)
@given(st.lists(st.integers(0, EOS_ID + 5), max_size=20), st.data())
def test_text_does_not_depend_on_when_it_is_taken(output: list[int], data: st.DataObject) -> None:
    stream, text = make_stream(), ""
    for token_id in output:
        stream.push(token_id)
        if data.draw(st.booleans()):
            text += stream.take()
    stream.flush()
    assert text + stream.take() == TOKENIZER.decode(output)
