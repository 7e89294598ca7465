from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.router.stop_strings import StopStrings


def first_match(text: str, stop: list[str]) -> tuple[int, int] | None:
    """Search the plain way: where the match that is complete first begins and ends."""
    for end in range(1, len(text) + 1):
        starts = [end - len(string) for string in stop if text[:end].endswith(string)]
        if starts:
            return min(starts), end
    return None


@settings(deadline=None)
@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=6), min_size=1, max_size=4),
    st.data(),
)
def test_text_is_cut_as_by_a_plain_search_however_it_comes(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    stops = StopStrings(stop)
    kept, num_read = "", 0
    while num_read < len(text) and not stops.found:
        size = data.draw(st.integers(1, len(text) - num_read))
        kept += stops.push(text[num_read : num_read + size])
        num_read += size
    match = first_match(text, stop)
    assert stops.found == (match is not None)
    if match is None:
        assert kept + stops.release() == text
    else:
        assert kept == text[: match[0]]
        assert num_read >= match[1]


@settings(deadline=None)
@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_no_more_is_held_back_than_could_begin_a_stop_string(text: str, stop: list[str]) -> None:
    stops = StopStrings(stop)
    kept = ""
    for num_read, character in enumerate(text, 1):
        kept += stops.push(character)
        if stops.found:
            return
        seen = text[:num_read]
        held = max(
            length
            for length in range(num_read + 1)
            if any(string.startswith(seen[num_read - length :]) for string in stop)
        )
        assert kept == seen[: num_read - held]


def test_string_that_is_complete_first_wins_wherever_tokens_end() -> None:
    for pieces in (["abcd"], ["ab", "cd"], list("abcd")):
        stops = StopStrings(["abcd", "bc"])
        kept = ""
        for piece in pieces:
            kept += "" if stops.found else stops.push(piece)
        assert (kept, stops.found) == ("a", True)


class CountingText(str):
    """Text that counts how often one of its characters is looked at."""

    num_reads = 0

    def __getitem__(self, key: object) -> str:
        type(self).num_reads += isinstance(key, int)
        return super().__getitem__(key)  # type: ignore[index]


def test_long_stop_strings_that_nearly_match_cost_a_few_reads_a_character() -> None:
    length, num_characters = 1024, 8192
    CountingText.num_reads = 0
    nearly = [CountingText("a" * (length - 1) + "b"), CountingText("ab" * (length // 2 - 1) + "aa")]
    stops = StopStrings(nearly)
    kept = "".join(stops.push("a") for _ in range(num_characters))
    assert kept + stops.release() == "a" * num_characters
    assert CountingText.num_reads < 12 * len(nearly) * num_characters
