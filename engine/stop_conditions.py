"""When a choice ends by its tokens alone. Stop strings are the router's, which knows the text."""

from collections.abc import Collection
from dataclasses import dataclass

from paceline.request import FinishReason
from paceline.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class StopConditions:
    """The conditions of one sequence, wherever its next token is sampled.

    `min_tokens` is not looked at: before it the sampler gives no token that stops.
    """

    stop_token_ids: frozenset[int]
    """End-of-sequence tokens included, unless the request ignores them."""
    max_output_tokens: int

    @classmethod
    def of(
        cls,
        sampling: SamplingParams,
        *,
        num_prompt_tokens: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
    ) -> "StopConditions":
        """Work the conditions out; prompt and output together fill the model's length at most."""
        stop_token_ids = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stop_token_ids |= frozenset(eos_token_ids)
        max_output_tokens = max_model_len - num_prompt_tokens
        if sampling.max_tokens is not None:
            max_output_tokens = min(max_output_tokens, sampling.max_tokens)
        return cls(stop_token_ids, max_output_tokens)

    def reason_to_finish(self, token_id: int, index: int) -> FinishReason | None:
        """Say why output token `index` (from 0) is the choice's last, or None if it goes on."""
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        if index + 1 >= self.max_output_tokens:
            return FinishReason.LENGTH
        return None
