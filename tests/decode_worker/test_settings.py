import pytest
from pydantic import ValidationError

from paceline.decode_worker.settings import DecodeSettings


def test_unlimited_local_prefill_is_none_for_the_scheduler() -> None:
    assert DecodeSettings().max_local_prefill_tokens == 0
    assert DecodeSettings(local_prefill_tokens=64).max_local_prefill_tokens == 64
    assert DecodeSettings(local_prefill_tokens="unlimited").max_local_prefill_tokens is None


def test_a_step_that_decode_rows_fill_leaves_no_room_for_prompts() -> None:
    DecodeSettings(max_num_seqs=64, max_num_batched_tokens=64)
    with pytest.raises(ValidationError, match="prompts computed here would wait for ever"):
        DecodeSettings(max_num_seqs=64, max_num_batched_tokens=64, local_prefill_tokens="unlimited")


def test_negative_local_prefill_is_refused() -> None:
    with pytest.raises(ValidationError, match="it must be 0, a number of tokens, or unlimited"):
        DecodeSettings(local_prefill_tokens=-1)
