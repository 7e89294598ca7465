"""How one request wants its tokens chosen; names and meanings are vLLM's."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from paceline.errors import FieldViolation

MAX_TOKENS = 2**31 - 1
"""More than any model's length, and what an int32 on the wire or a device holds."""
MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters of one request, the same for all its choices.

    The next token is a function of (prompt, output so far, these parameters, seed, choice, index),
    so any worker can continue any request. `seed` is drawn by the router when the client gives
    none.
    """

    max_tokens: int | None = None
    """Output tokens a choice at most; None: as many as the model's length allows."""
    temperature: float = 1.0
    """0 is greedy; otherwise logits are divided by it."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one."""
    seed: int | None = None
    """64-bit seed of the request's random stream."""
    n: int = 1
    """Choices to generate from one prompt."""
    repetition_penalty: float = 1.0
    """Divide positive, multiply negative logits of tokens in prompt or output; 1 is off."""
    presence_penalty: float = 0.0
    """Subtract once from logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtract per occurrence from logits of tokens in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit) pairs, applied before everything else."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones; None reports
    none.
    """
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    min_tokens: int = 0
    """Tokens before which neither end-of-sequence nor stop token ids may be sampled."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a choice; the token itself is reported, its text is not."""
    stop: tuple[str, ...] = field(default=())
    """Strings that end a choice (the router's business); the text is cut before them. The router
    adds the ids of those that are special tokens to `stop_token_ids`."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def violations(self, vocab_size: int) -> Iterator[FieldViolation]:
        """Yield everything that is wrong with the parameters of a request."""
        yield from self.out_of_range(vocab_size)
        if self.max_tokens is not None and 0 < self.max_tokens < self.min_tokens:
            yield FieldViolation(
                "min_tokens", f"{self.min_tokens} is more than max_tokens, {self.max_tokens}"
            )

    def out_of_range(self, vocab_size: int) -> Iterator[FieldViolation]:
        """Yield every parameter that is out of its range, with the range: what no worker takes.

        The entries of a list that is too long are not looked at.
        """
        yield from _out_of_range("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        yield from _out_of_range("temperature", self.temperature, 0.0, 100.0)
        yield from _out_of_range("top_k", self.top_k, 0, vocab_size)
        yield from _out_of_range("min_p", self.min_p, 0.0, 1.0)
        yield from _out_of_range("n", self.n, 1, MAX_CHOICES)
        yield from _out_of_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        yield from _out_of_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        yield from _out_of_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        yield from _out_of_range("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        yield from _out_of_range("seed", self.seed, 0, 2**64 - 1)
        if not 0.0 < self.top_p <= 1.0:
            yield FieldViolation("top_p", f"must be over 0 and at most 1, got {self.top_p}")
        yield from _out_of_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        too_long = list(
            lists_too_long(len(self.stop_token_ids), len(self.stop), len(self.logit_bias))
        )
        yield from too_long
        if not too_long:
            yield from self._wrong_entries(vocab_size)

    def _wrong_entries(self, vocab_size: int) -> Iterator[FieldViolation]:
        for number, stop in enumerate(self.stop):
            yield from _too_many(f"stop[{number}]", len(stop), MAX_STOP_CHARACTERS, "characters")
        if "" in self.stop:
            yield FieldViolation("stop", "an empty string would stop at once")
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", tuple(token for token, _ in self.logit_bias)),
        ):
            for token in ids:
                yield from _out_of_range(name, token, 0, vocab_size - 1)
        for token, bias in self.logit_bias:
            yield from _out_of_range(f"logit_bias[{token}]", bias, -100.0, 100.0)


def lists_too_long(
    num_stop_token_ids: int, num_stop_strings: int, num_logit_biases: int
) -> Iterator[FieldViolation]:
    """Yield which lists of a request have too many entries. Asked before the entries are read."""
    yield from _too_many("stop_token_ids", num_stop_token_ids, MAX_STOP_TOKEN_IDS)
    yield from _too_many("stop", num_stop_strings, MAX_STOP_STRINGS)
    yield from _too_many("logit_bias", num_logit_biases, MAX_LOGIT_BIAS)


def _out_of_range(
    name: str, value: float | None, low: float, high: float
) -> Iterator[FieldViolation]:
    # Written so that NaN, which compares false with everything, is a violation too.
    if value is None or (low <= value <= high):
        return
    yield FieldViolation(name, f"must be between {low} and {high}, got {value}")


def _too_many(name: str, count: int, limit: int, what: str = "entries") -> Iterator[FieldViolation]:
    if count > limit:
        yield FieldViolation(name, f"has {count} {what}, at most {limit} are allowed")
