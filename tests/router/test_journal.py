"""A client's stream never has a gap, a repeat or a change."""

from hypothesis import given
from hypothesis import strategies as st
from router_requests import SilentText, make_journal

from paceline.request import FinishReason
from paceline.router.journal import ChoiceJournal, Logprobs

OUTPUT = [10, 11, 12, 13, 14, 15]


def make_choice(stop_token: int | None = None, *, wants_logprobs: bool = False) -> ChoiceJournal:
    return ChoiceJournal(0, SilentText(stop_token), wants_logprobs=wants_logprobs)


@given(
    st.permutations(range(len(OUTPUT))),
    st.lists(st.integers(0, len(OUTPUT) - 1), max_size=12),
    st.randoms(use_true_random=False),
)
def test_tokens_in_any_order_and_number_become_one_stream_without_gap_or_repeat(
    order: list[int], repeats: list[int], random
) -> None:
    arrivals = order + repeats
    random.shuffle(arrivals)
    choice = make_choice()
    taken: list[int] = []
    for index in arrivals:
        choice.add(index, OUTPUT[index])
        delta = choice.take()
        if delta is not None:
            assert delta.first_index == len(taken)
            taken += delta.token_ids
    assert taken == OUTPUT == choice.output


def test_first_token_of_an_index_wins() -> None:
    choice = make_choice()
    choice.add(0, 10)
    choice.add(0, 99)
    choice.add(2, 12)
    choice.add(2, 99)
    choice.add(1, 11)
    assert choice.output == [10, 11, 12]


def test_early_tokens_of_an_ended_attempt_are_forgotten() -> None:
    choice = make_choice()
    choice.add(0, 10)
    choice.add(2, 99)
    choice.end(FinishReason.LENGTH)
    choice.forget_early()
    choice.add(1, 11)
    choice.add(2, 12)
    assert choice.output == [10, 11, 12]
    assert choice.finish_reason is None


def test_choice_ends_only_when_the_tokens_before_its_last_have_come() -> None:
    choice = make_choice()
    choice.add(0, 10)
    choice.add(2, 12)
    choice.end(FinishReason.LENGTH)
    assert choice.finish_reason is None
    assert choice.add(1, 11), "the end is reported with the token that closes the gap"
    assert choice.finish_reason is FinishReason.LENGTH
    delta = choice.take()
    assert delta is not None
    assert delta.token_ids == [10, 11, 12]
    assert delta.finish_reason is FinishReason.LENGTH
    assert choice.take() is None


def test_stop_string_ends_the_choice_and_drops_what_follows() -> None:
    choice = make_choice(stop_token=11)
    assert not choice.add(0, 10)
    assert choice.add(1, 11)
    assert not choice.add(2, 12)
    choice.end(FinishReason.LENGTH)
    assert choice.output == [10, 11]
    assert choice.finish_reason is FinishReason.STOP


def test_stop_string_completed_by_an_early_token_is_reported_when_the_gap_closes() -> None:
    choice = make_choice(stop_token=11)
    choice.add(1, 11)
    choice.add(2, 12)
    assert choice.add(0, 10)
    assert choice.output == [10, 11]


def test_stop_string_that_is_complete_only_at_the_end_is_the_reason_of_the_end() -> None:
    for ends_in_stop, wanted in ((True, FinishReason.STOP), (False, FinishReason.LENGTH)):
        choice = ChoiceJournal(0, SilentText(ends_in_stop=ends_in_stop))
        choice.add(0, 10)
        choice.end(FinishReason.LENGTH)
        assert choice.finish_reason is wanted


def test_logprobs_stay_with_their_tokens() -> None:
    choice = make_choice(wants_logprobs=True)
    choice.add(1, 11, Logprobs(-1.0, ()))
    choice.add(0, 10, Logprobs(-0.5, ()))
    delta = choice.take()
    assert delta is not None
    assert [entry and entry.logprob for entry in delta.logprobs] == [-0.5, -1.0]


@given(st.permutations([(source, index) for source in range(2) for index in range(3)]))
def test_every_token_has_its_own_logprobs_whichever_worker_reports_it_first(
    arrivals: list[tuple[int, int]],
) -> None:
    """Both workers report first tokens, each with log-probabilities."""
    choice = make_choice(wants_logprobs=True)
    tokens: list[int] = []
    logprobs: list[float] = []
    for source, index in arrivals:
        choice.add(index, OUTPUT[index], Logprobs(-index - source / 10, ()))
        delta = choice.take()
        if delta is not None:
            tokens += delta.token_ids
            logprobs += [entry.logprob for entry in delta.logprobs if entry is not None]
    assert tokens == OUTPUT[:3]
    first = [next(source for source, i in arrivals if i == index) for index in range(3)]
    assert logprobs == [-index - source / 10 for index, source in enumerate(first)]


def test_request_is_finished_when_every_choice_is() -> None:
    journal = make_journal(n=2)
    for choice in journal.choices:
        assert not journal.is_finished
        choice.add(0, 5)
        choice.end(FinishReason.STOP)
    assert journal.is_finished
    assert journal.num_output_tokens == 2
    assert [delta.choice for delta in journal.take()] == [0, 1]
