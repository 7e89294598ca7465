"""Hold a request against the model's limits, and name everything that is wrong at once. Pure."""

import math
from collections.abc import Iterator, Sequence

from paceline.errors import FieldViolation, InvalidRequestError, ModelNotFoundError, clip
from paceline.router.message_size import MAX_WORK_TOKENS
from paceline.router.model import ServedModel
from paceline.router.settings import RouterSettings
from paceline.sampling_params import SamplingParams
from paceline.wire import MAX_MESSAGE_BYTES

MAX_REQUEST_ID_CHARS = 128
MAX_SHOWN_CHARS = 200
"""Of a name in a message, which may be as long as a request."""
MAX_CHAT_MESSAGES = 8192
"""More take the event loop over 10 ms to read."""


def check_model(name: str, model: ServedModel) -> None:
    """Raise ModelNotFoundError unless the name is empty or that of the served model."""
    if name not in ("", model.name):
        raise ModelNotFoundError(
            f"the model {clip(name, MAX_SHOWN_CHARS)!r} is not served here; this deployment serves "
            f"{model.name!r} (model.served_model_name)"
        )


def envelope_violations(
    request_id: str, timeout_s: float, settings: RouterSettings
) -> Iterator[FieldViolation]:
    """Yield what is wrong with a request apart from prompt and sampling."""
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        yield FieldViolation(
            "request_id",
            f"has {len(request_id)} characters, at most {MAX_REQUEST_ID_CHARS} are allowed",
        )
    elif not request_id.isprintable():
        yield FieldViolation("request_id", "has characters that cannot be printed in a log line")
    if math.isnan(timeout_s) or not 0 <= timeout_s <= settings.max_timeout_s:
        yield FieldViolation(
            "timeout_s",
            f"must be between 0 and {settings.max_timeout_s} (router.max_timeout_s), got "
            f"{timeout_s}",
        )


def sampling_violations(sampling: SamplingParams, model: ServedModel) -> Iterator[FieldViolation]:
    """Yield every sampling parameter that is out of range."""
    for violation in sampling.violations(model.vocab_size):
        yield violation._replace(field=f"sampling.{violation.field}")


def check_prompt_size(num_tokens: int, model: ServedModel, field: str) -> None:
    """Raise InvalidRequestError if the model cannot continue a prompt of so many tokens.

    Asked before the tokens are read.
    """
    limit = model.max_model_len
    if num_tokens >= limit:
        raise InvalidRequestError(
            FieldViolation(
                field,
                f"the prompt has {num_tokens} tokens, and model.max_model_len is {limit} for "
                f"prompt and output together; shorten the prompt to at most {limit - 1} tokens, or "
                "raise that setting if the model allows",
            )
        )


def check_chat_size(num_messages: int) -> None:
    """Raise InvalidRequestError for more messages than are read."""
    if num_messages > MAX_CHAT_MESSAGES:
        raise InvalidRequestError(
            FieldViolation(
                "chat.messages",
                f"has {num_messages} messages, at most {MAX_CHAT_MESSAGES} are allowed",
            )
        )


def prompt_violations(
    token_ids: Sequence[int], sampling: SamplingParams, model: ServedModel, field: str
) -> Iterator[FieldViolation]:
    """Yield what is wrong with a prompt that is no longer than the model; `field` is the form in
    which it came."""
    num_tokens, limit = len(token_ids), model.max_model_len
    if not num_tokens:
        yield FieldViolation(field, "the prompt is empty; at least one token is needed")
        return
    largest = max(token_ids)
    if largest >= model.vocab_size:
        count = sum(token_id >= model.vocab_size for token_id in token_ids)
        position = next(i for i, token_id in enumerate(token_ids) if token_id >= model.vocab_size)
        yield FieldViolation(
            field,
            f"the model has token ids from 0 to {model.vocab_size - 1}; {count} of the prompt's "
            f"are larger, the first is {token_ids[position]} at position {position}",
        )
    if sampling.max_tokens is not None and num_tokens + sampling.max_tokens > limit:
        yield FieldViolation(
            "sampling.max_tokens",
            f"{num_tokens} prompt tokens and max_tokens {sampling.max_tokens} are "
            f"{num_tokens + sampling.max_tokens} together, and model.max_model_len is {limit}; "
            f"lower max_tokens to at most {limit - num_tokens}, or leave it out",
        )
    num_resumable = num_tokens + (sampling.max_tokens or 1) - 1
    if num_resumable > MAX_WORK_TOKENS:
        yield FieldViolation(
            field,
            f"prompt and output may be {num_resumable} tokens, and the messages of "
            f"{MAX_MESSAGE_BYTES} bytes that workers accept carry at most {MAX_WORK_TOKENS}; "
            "shorten the prompt or lower max_tokens",
        )
