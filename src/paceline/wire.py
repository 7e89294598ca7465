"""Turn what every process shares into messages and back; the only place that knows both forms.

Columns (StepReport, LeaseUpdate) are packed as little-endian uint32, four bytes an element, so
that a step's tokens cost a copy and not an object each. Floats are 32 bits wide on the wire: what
has crossed it once stays as it is, so every worker computes with the same parameters.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paceline.errors import FieldViolation, InvalidRequestError
from paceline.internal.v1 import worker_pb2
from paceline.request import (
    AttemptKey,
    FailureReason,
    FinishReason,
    PhaseTimes,
    Span,
    TokenIds,
    TopLogprobs,
    Work,
)
from paceline.sampling_params import MAX_CHOICES, SamplingParams, lists_too_long
from paceline.v1 import inference_pb2

Uint32Array = npt.NDArray[np.uint32]

MAX_TOKEN_ID = 2**31 - 1

MAX_MESSAGE_BYTES = 64 << 20
"""What routers and workers accept from each other."""

MAX_NAME_CHARS = 1024
"""Of a name in a message. A request's has its client's 128, its router's and its choices'."""

_DEFAULTS = SamplingParams()


def pack_uint32(values: Sequence[int] | npt.NDArray[np.integer]) -> bytes:
    """Write a column. Raises OverflowError when a value is not one of a uint32."""
    if isinstance(values, np.ndarray) and values.dtype == np.uint32:
        return values.astype("<u4", copy=False).tobytes()
    column = np.asarray(values, dtype=np.int64)
    if column.size and not (column.min() >= 0 and column.max() < 2**32):
        raise OverflowError(f"a column of uint32 got values from {column.min()} to {column.max()}")
    return column.astype("<u4").tobytes()


def unpack_uint32(column: bytes) -> Uint32Array:
    """Read a column, without a copy: the array cannot be written."""
    if len(column) % 4:
        raise _violation("column", f"has {len(column)} bytes, no whole number of uint32")
    return np.frombuffer(column, dtype="<u4").astype(np.uint32, copy=False)


class StepColumns(NamedTuple):
    """The columns of a StepReport."""

    stream_ids: Uint32Array
    """[N] which (attempt, choice)"""
    indices: Uint32Array
    """[N] output index"""
    token_ids: Uint32Array
    """[N]"""
    finished_stream_ids: Uint32Array
    """[F] choices that ended with their token in this report"""
    finish_reasons: npt.NDArray[np.uint8]
    """[F] FinishReason values"""


def step_columns_from_proto(report: worker_pb2.StepReport) -> StepColumns:
    """Read the columns of a report; columns of one element must be equally long."""
    columns = StepColumns(
        unpack_uint32(report.stream_ids),
        unpack_uint32(report.indices),
        unpack_uint32(report.token_ids),
        unpack_uint32(report.finished_stream_ids),
        np.frombuffer(report.finish_reasons, dtype=np.uint8),
    )
    lengths = [len(column) for column in columns]
    if len(set(lengths[:3])) > 1 or lengths[3] != lengths[4]:
        raise _violation("step", f"columns differ in length: {lengths}")
    return columns


def work_to_proto(work: Work) -> worker_pb2.Work:
    return worker_pb2.Work(
        request_id=work.key.request_id,
        attempt=work.key.attempt,
        choices=work.choices,
        stream_ids=work.stream_ids,
        prompt_token_ids=work.prompt.tolist(),
        output_token_ids=work.output.tolist(),
        # Stop strings are the router's: workers know no text.
        sampling=sampling_to_proto(replace(work.sampling, stop=())),
        tenant=work.tenant,
    )


class WorkLimits(NamedTuple):
    """What a worker's model bounds."""

    vocab_size: int
    max_model_len: int


def work_from_proto(message: worker_pb2.Work, limits: WorkLimits) -> Work:
    """Read work. Raises InvalidRequestError for whatever would hurt the engine.

    Counts are checked before anything is read.
    """
    if too_long := list(_work_too_long(message, limits)):
        raise InvalidRequestError(*too_long)
    sampling = sampling_from_request(message.sampling)
    work = Work(
        key=AttemptKey(message.request_id, message.attempt),
        choices=tuple(message.choices),
        stream_ids=tuple(message.stream_ids),
        prompt=token_ids_from_proto(
            message.prompt_token_ids, "prompt_token_ids", limits.vocab_size
        ),
        output=token_ids_from_proto(
            message.output_token_ids, "output_token_ids", limits.vocab_size
        ),
        sampling=sampling,
        tenant=message.tenant,
    )
    violations = [
        FieldViolation(field, description)
        for is_wrong, field, description in (
            (not work.key.request_id, "request_id", "is empty"),
            (not work.choices, "choices", "is empty"),
            (
                len(set(work.choices)) < len(work.choices)
                or max(work.choices, default=0) >= MAX_CHOICES,
                "choices",
                f"are {work.choices}; each is from 0 to {MAX_CHOICES - 1}, and there once",
            ),
            (
                len(set(work.stream_ids)) < len(work.stream_ids),
                "stream_ids",
                "name two choices alike",
            ),
            (
                len(work.stream_ids) != len(work.choices),
                "stream_ids",
                f"has {len(work.stream_ids)} entries for {len(work.choices)} choices",
            ),
            (not len(work.prompt), "prompt_token_ids", "is empty"),
            (
                len(work.output) > 0 and len(work.choices) != 1,
                "output_token_ids",
                f"has tokens, and {len(work.choices)} choices would share them",
            ),
            (sampling.seed is None, "sampling.seed", "is not set"),
            (sampling.max_tokens is None, "sampling.max_tokens", "is not set"),
        )
        if is_wrong
    ]
    violations += _of_sampling(sampling.out_of_range(limits.vocab_size))
    if violations:
        raise InvalidRequestError(*violations)
    return work


def _work_too_long(message: worker_pb2.Work, limits: WorkLimits) -> Iterator[FieldViolation]:
    for field, length, most, what in (
        ("request_id", len(message.request_id), MAX_NAME_CHARS, "characters"),
        ("tenant", len(message.tenant), MAX_NAME_CHARS, "characters"),
        ("choices", len(message.choices), MAX_CHOICES, "entries"),
        ("stream_ids", len(message.stream_ids), MAX_CHOICES, "entries"),
    ):
        if length > most:
            yield FieldViolation(field, f"has {length} {what}, at most {most} are allowed")
    num_tokens = len(message.prompt_token_ids) + len(message.output_token_ids)
    if num_tokens > limits.max_model_len:
        yield FieldViolation(
            "prompt_token_ids",
            f"are {num_tokens} with the output so far, model.max_model_len is "
            f"{limits.max_model_len}",
        )


def token_ids_from_proto(
    token_ids: Sequence[int], field: str, vocab_size: int = MAX_TOKEN_ID + 1
) -> TokenIds:
    """Read token ids; `field` names them in the error for an id outside the vocabulary."""
    array = np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
    if array.size and array.max() >= vocab_size:
        raise _violation(field, f"has the token id {array.max()}, over {vocab_size - 1}")
    return array.astype(np.int32)


def sampling_to_proto(sampling: SamplingParams) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        n=sampling.n,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs,
        ignore_eos=sampling.ignore_eos,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        stop=sampling.stop,
    )


def sampling_from_request(message: inference_pb2.SamplingParams) -> SamplingParams:
    """Read parameters; an unset field has the default of `SamplingParams`.

    Fields without `optional` in the proto have 0, empty or false as their default in both.
    Raises InvalidRequestError for a list that is too long to be read. All else is left to
    `SamplingParams.violations`.
    """
    counts = (len(message.stop_token_ids), len(message.stop), len(message.logit_bias))
    if too_long := _of_sampling(lists_too_long(*counts)):
        raise InvalidRequestError(*too_long)

    def given(field: str) -> bool:
        return message.HasField(field)  # type: ignore[arg-type]

    return SamplingParams(
        max_tokens=message.max_tokens if given("max_tokens") else _DEFAULTS.max_tokens,
        temperature=message.temperature if given("temperature") else _DEFAULTS.temperature,
        top_k=message.top_k,
        top_p=message.top_p if given("top_p") else _DEFAULTS.top_p,
        min_p=message.min_p,
        seed=message.seed if given("seed") else _DEFAULTS.seed,
        n=message.n if given("n") else _DEFAULTS.n,
        repetition_penalty=(
            message.repetition_penalty
            if given("repetition_penalty")
            else _DEFAULTS.repetition_penalty
        ),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        logprobs=message.logprobs if given("logprobs") else _DEFAULTS.logprobs,
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        stop=tuple(message.stop),
    )


def finish_reason_to_proto(reason: FinishReason) -> inference_pb2.FinishReason.ValueType:
    return inference_pb2.FinishReason.ValueType(reason.value)


def finish_reason_from_proto(
    value: inference_pb2.FinishReason.ValueType,
) -> FinishReason | None:
    """Read a finish reason; None: the choice goes on."""
    return FinishReason(value) if value else None


def failure_reason_to_proto(reason: FailureReason) -> worker_pb2.FailureReason.ValueType:
    return worker_pb2.FailureReason.ValueType(reason.value)


def failure_reason_from_proto(value: worker_pb2.FailureReason.ValueType) -> FailureReason:
    """Read a failure reason; one that this version does not know is INTERNAL."""
    known = {reason.value: reason for reason in FailureReason}
    return known.get(value, FailureReason.INTERNAL)


def top_logprobs_to_proto(logprobs: TopLogprobs) -> list[inference_pb2.TokenLogprob]:
    """Write the most likely tokens; the sampled one's log-probability has a field of its own."""
    return [
        inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob)
        for token_id, logprob in zip(logprobs.token_ids, logprobs.logprobs, strict=True)
    ]


def top_logprobs_from_proto(
    logprob: float, top: Iterable[inference_pb2.TokenLogprob]
) -> TopLogprobs:
    pairs = [(entry.token_id, entry.logprob) for entry in top]
    return TopLogprobs(
        logprob, tuple(token_id for token_id, _ in pairs), tuple(value for _, value in pairs)
    )


def span_to_proto(span: Span) -> inference_pb2.Span:
    return inference_pb2.Span(
        phase=span.phase,
        worker_id=span.worker_id,
        start_s=span.start_s,
        end_s=span.end_s,
        num_tokens=span.num_tokens,
    )


def span_from_proto(message: inference_pb2.Span) -> Span:
    return Span(
        message.phase, message.worker_id, message.start_s, message.end_s, message.num_tokens
    )


def phase_times_to_proto(times: PhaseTimes) -> inference_pb2.PhaseTimes:
    return inference_pb2.PhaseTimes(
        queue_s=times.queue_s,
        wait_s=times.wait_s,
        prefill_s=times.prefill_s,
        kv_transfer_s=times.kv_transfer_s,
        decode_s=times.decode_s,
        router_s=times.router_s,
    )


def phase_times_from_proto(message: inference_pb2.PhaseTimes) -> PhaseTimes:
    return PhaseTimes(
        queue_s=message.queue_s,
        wait_s=message.wait_s,
        prefill_s=message.prefill_s,
        kv_transfer_s=message.kv_transfer_s,
        decode_s=message.decode_s,
        router_s=message.router_s,
    )


def _of_sampling(violations: Iterable[FieldViolation]) -> list[FieldViolation]:
    return [violation._replace(field=f"sampling.{violation.field}") for violation in violations]


def _violation(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field, description))
