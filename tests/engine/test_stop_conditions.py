from paceline.engine.stop_conditions import StopConditions
from paceline.request import FinishReason
from paceline.sampling_params import SamplingParams

EOS = 7


def make_conditions(
    sampling: SamplingParams, num_prompt_tokens: int = 10, max_model_len: int = 100
) -> StopConditions:
    return StopConditions.of(
        sampling,
        num_prompt_tokens=num_prompt_tokens,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
    )


def test_end_of_sequence_and_stop_token_ids_stop() -> None:
    conditions = make_conditions(SamplingParams(max_tokens=50, stop_token_ids=(3, 4)))
    assert [conditions.reason_to_finish(token, 0) for token in (EOS, 3, 4)] == [
        FinishReason.STOP
    ] * 3
    assert conditions.reason_to_finish(5, 0) is None


def test_ignored_end_of_sequence_goes_on_unless_it_is_a_stop_token_id() -> None:
    assert (
        make_conditions(SamplingParams(max_tokens=50, ignore_eos=True)).reason_to_finish(EOS, 0)
        is None
    )
    both = SamplingParams(max_tokens=50, ignore_eos=True, stop_token_ids=(EOS,))
    assert make_conditions(both).reason_to_finish(EOS, 0) is FinishReason.STOP


def test_last_of_max_tokens_ends_by_length() -> None:
    conditions = make_conditions(SamplingParams(max_tokens=3))
    reasons = [conditions.reason_to_finish(1, index) for index in range(3)]
    assert reasons == [None, None, FinishReason.LENGTH]


def test_prompt_and_output_fill_the_models_length_at_most() -> None:
    for max_tokens in (None, 50):
        conditions = make_conditions(
            SamplingParams(max_tokens=max_tokens), num_prompt_tokens=98, max_model_len=100
        )
        assert conditions.reason_to_finish(1, 0) is None
        assert conditions.reason_to_finish(1, 1) is FinishReason.LENGTH


def test_a_stop_in_the_last_place_counts_as_stop() -> None:
    conditions = make_conditions(SamplingParams(max_tokens=1))
    assert conditions.reason_to_finish(EOS, 0) is FinishReason.STOP
