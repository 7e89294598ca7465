"""Compare greedy output with transformers, by the rule for fp32.

The emitted tokens are fed through transformers in one pass (teacher forcing). Each must be the most
likely token there; where it is not, its logit must lie within `MARGIN` of the best one, as it may
when two candidates lie within rounding. How many were excused is counted, for the test to print.
"""

import torch
import transformers

MARGIN = 5e-4


class Reference:
    """transformers' model, and what has been compared with it already."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._model = model
        self._checked: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
        self.num_tokens = 0
        self.num_excused = 0

    def check(self, prompt: list[int], tokens: list[int]) -> None:
        """Raise AssertionError at the first token that greedy decoding would not have chosen."""
        key = (tuple(prompt), tuple(tokens))
        if key in self._checked:
            return
        with torch.inference_mode():
            logits = self._model(
                torch.tensor([prompt + tokens[:-1]], device=self._model.device),
                logits_to_keep=len(tokens),
            ).logits[0]
        best = logits.max(dim=-1)
        for index, token in enumerate(tokens):
            self.num_tokens += 1
            if token == best.indices[index]:
                continue
            margin = float(best.values[index] - logits[index, token])
            assert margin < MARGIN, (
                f"prompt of {len(prompt)} tokens, output index {index}: got {token}, transformers "
                f"would give {int(best.indices[index])}, better by {margin:.2e}"
            )
            self.num_excused += 1
        self._checked.add(key)


def greedy_tokens(
    model: transformers.PreTrainedModel, prompt: list[int], num_tokens: int
) -> list[int]:
    """transformers' greedy continuation, not stopped by the end of sequence."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in output[0, len(prompt) :]]
