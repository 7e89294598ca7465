"""What crosses the wire comes out as it went in; what breaks a promise is refused by name."""

import dataclasses
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import InvalidRequestError
from paceline.internal.v1 import worker_pb2
from paceline.request import AttemptKey, FailureReason, FinishReason, PhaseTimes, Span, Work
from paceline.sampling_params import SamplingParams
from paceline.v1 import inference_pb2
from paceline.wire import (
    WorkLimits,
    failure_reason_from_proto,
    failure_reason_to_proto,
    finish_reason_from_proto,
    finish_reason_to_proto,
    pack_uint32,
    phase_times_from_proto,
    phase_times_to_proto,
    sampling_from_request,
    sampling_to_proto,
    span_from_proto,
    span_to_proto,
    step_columns_from_proto,
    token_ids_from_proto,
    unpack_uint32,
    work_from_proto,
    work_to_proto,
)

UINT32 = st.integers(0, 2**32 - 1)
TOKEN = st.integers(0, 999)
FLOAT32 = st.floats(width=32, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)

SAMPLINGS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(0, 2**31 - 1),
    temperature=FLOAT32,
    top_k=UINT32,
    top_p=FLOAT32,
    min_p=FLOAT32,
    seed=st.none() | st.integers(0, 2**64 - 1),
    n=UINT32,
    repetition_penalty=FLOAT32,
    presence_penalty=FLOAT32,
    frequency_penalty=FLOAT32,
    logit_bias=st.dictionaries(UINT32, FLOAT32, max_size=4).map(lambda d: tuple(sorted(d.items()))),
    logprobs=st.none() | UINT32,
    ignore_eos=st.booleans(),
    min_tokens=UINT32,
    stop_token_ids=st.lists(UINT32, max_size=4).map(tuple),
    stop=st.lists(TEXT, max_size=3).map(tuple),
)


LIMITS = WorkLimits(vocab_size=1000, max_model_len=100)
VALID_SAMPLINGS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**31 - 1),
    temperature=st.floats(0.0, 100.0, width=32),
    top_k=st.integers(0, 1000),
    top_p=st.floats(0.125, 1.0, width=32),
    seed=st.integers(0, 2**64 - 1),
    n=st.integers(1, 64),
    logit_bias=st.dictionaries(
        st.integers(0, 999), st.floats(-100.0, 100.0, width=32), max_size=4
    ).map(lambda d: tuple(sorted(d.items()))),
    logprobs=st.none() | st.integers(0, 20),
    ignore_eos=st.booleans(),
    min_tokens=st.integers(0, 2**31 - 1),
    stop_token_ids=st.lists(st.integers(0, 999), max_size=4).map(tuple),
    stop=st.lists(TEXT.filter(bool), max_size=3).map(tuple),
)


def make_work(
    choices: tuple[int, ...] = (0,), output: tuple[int, ...] = (), **sampling: object
) -> Work:
    parameters = {"seed": 1, "max_tokens": 5, **sampling}
    return Work(
        key=AttemptKey("r-1", 2),
        choices=choices,
        stream_ids=tuple(7 + choice for choice in choices),
        prompt=np.array([1, 2, 3], np.int32),
        output=np.array(output, np.int32),
        sampling=SamplingParams(**parameters),  # type: ignore[arg-type]
        tenant="t",
    )


def refused_fields(message: worker_pb2.Work) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        work_from_proto(message, LIMITS)
    return [violation.field for violation in caught.value.violations]


@given(st.lists(UINT32))
def test_columns_come_out_as_they_went_in(values: list[int]) -> None:
    column = pack_uint32(values)
    assert column == b"".join(value.to_bytes(4, "little") for value in values)
    assert column == pack_uint32(np.array(values, np.uint32))
    assert column == pack_uint32(np.array(values, np.int64))
    unpacked = unpack_uint32(column)
    assert unpacked.dtype == np.uint32
    assert unpacked.tolist() == values


@pytest.mark.parametrize("values", [[-1], [2**32], [0, 2**40]])
def test_column_refuses_what_is_no_uint32(values: list[int]) -> None:
    with pytest.raises(OverflowError, match="got values from"):
        pack_uint32(values)


def test_column_of_broken_length_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="has 5 bytes"):
        unpack_uint32(b"12345")


def test_step_columns_are_read_and_their_lengths_compared() -> None:
    report = worker_pb2.StepReport(
        stream_ids=pack_uint32([4, 5]),
        indices=pack_uint32([0, 9]),
        token_ids=pack_uint32([11, 2**32 - 1]),
        finished_stream_ids=pack_uint32([5]),
        finish_reasons=bytes([FinishReason.LENGTH.value]),
    )
    columns = step_columns_from_proto(report)
    assert [column.tolist() for column in columns] == [[4, 5], [0, 9], [11, 2**32 - 1], [5], [2]]
    report.indices = pack_uint32([0])
    with pytest.raises(InvalidRequestError, match=r"\[2, 1, 2, 1, 1\]"):
        step_columns_from_proto(report)
    report.indices = pack_uint32([0, 9])
    report.finish_reasons = b""
    with pytest.raises(InvalidRequestError, match=r"\[2, 2, 2, 1, 0\]"):
        step_columns_from_proto(report)


def test_a_report_without_tokens_has_empty_columns() -> None:
    assert [len(column) for column in step_columns_from_proto(worker_pb2.StepReport())] == [0] * 5


@given(SAMPLINGS)
def test_sampling_comes_out_as_it_went_in(sampling: SamplingParams) -> None:
    bytes_on_wire = sampling_to_proto(sampling).SerializeToString()
    message = inference_pb2.SamplingParams.FromString(bytes_on_wire)
    assert sampling_from_request(message) == sampling


def test_unset_sampling_has_the_defaults_of_the_dataclass() -> None:
    assert sampling_from_request(inference_pb2.SamplingParams()) == SamplingParams()
    assert sampling_from_request(inference_pb2.GenerateRequest().sampling) == SamplingParams()


def test_values_that_are_zero_on_purpose_stay_zero() -> None:
    message = inference_pb2.SamplingParams(
        temperature=0.0, top_p=0.0, seed=0, n=0, repetition_penalty=0.0, logprobs=0, max_tokens=0
    )
    assert sampling_from_request(message) == SamplingParams(
        temperature=0.0, top_p=0.0, seed=0, n=0, repetition_penalty=0.0, logprobs=0, max_tokens=0
    )


def test_every_parameter_of_the_proto_is_one_of_the_dataclass() -> None:
    on_wire = {field.name for field in inference_pb2.SamplingParams.DESCRIPTOR.fields}
    assert on_wire == {field.name for field in dataclasses.fields(SamplingParams)}


def test_not_a_number_crosses_the_wire_to_be_refused_there() -> None:
    message = sampling_to_proto(SamplingParams(temperature=math.nan))
    assert math.isnan(sampling_from_request(message).temperature)


def test_floats_stay_as_they_are_after_their_first_crossing() -> None:
    once = sampling_from_request(sampling_to_proto(SamplingParams(temperature=0.7)))
    assert once.temperature == pytest.approx(0.7)
    assert sampling_from_request(sampling_to_proto(once)) == once


@given(
    request_id=TEXT.filter(bool),
    attempt=UINT32,
    prompt=st.lists(TOKEN, min_size=1, max_size=50),
    output=st.lists(TOKEN, max_size=50),
    num_choices=st.integers(1, 4),
    sampling=VALID_SAMPLINGS,
    tenant=TEXT,
)
def test_work_comes_out_as_it_went_in_without_what_is_the_routers(
    request_id: str,
    attempt: int,
    prompt: list[int],
    output: list[int],
    num_choices: int,
    sampling: SamplingParams,
    tenant: str,
) -> None:
    work = Work(
        key=AttemptKey(request_id, attempt),
        choices=tuple(range(num_choices)),
        stream_ids=tuple(range(100, 100 + num_choices)),
        prompt=np.array(prompt, np.int32),
        output=np.array(output if num_choices == 1 else [], np.int32),
        sampling=sampling,
        tenant=tenant,
    )
    message = worker_pb2.Work.FromString(work_to_proto(work).SerializeToString())
    read = work_from_proto(message, LIMITS)
    for field in ("key", "choices", "stream_ids", "tenant"):
        assert getattr(read, field) == getattr(work, field)
    assert read.sampling == dataclasses.replace(work.sampling, stop=())
    for array, original in ((read.prompt, work.prompt), (read.output, work.output)):
        assert array.dtype == np.int32
        assert np.array_equal(array, original)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"request_id": ""}, "request_id"),
        ({"choices": [], "stream_ids": []}, "choices"),
        ({"stream_ids": [1, 2]}, "stream_ids"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [1000]}, "prompt_token_ids"),
        ({"prompt_token_ids": [2**31]}, "prompt_token_ids"),
        ({"prompt_token_ids": [1] * 101}, "prompt_token_ids"),
        ({"choices": [64]}, "choices"),
        ({"choices": [2**32 - 1]}, "choices"),
        ({"choices": [3, 3], "stream_ids": [1, 2]}, "choices"),
        ({"choices": [0, 1], "stream_ids": [7, 7]}, "stream_ids"),
        ({"tenant": "t" * 1025}, "tenant"),
        ({"request_id": "r" * 1025}, "request_id"),
        ({"output_token_ids": [2**32 - 1]}, "output_token_ids"),
        ({"choices": [0, 1], "stream_ids": [1, 2], "output_token_ids": [5]}, "output_token_ids"),
    ],
)
def test_work_that_breaks_a_promise_is_refused_by_field(
    change: dict[str, object], field: str
) -> None:
    message = work_to_proto(make_work())
    for name, value in change.items():
        message.ClearField(name)  # type: ignore[arg-type]
        message.MergeFrom(worker_pb2.Work(**{name: value}))  # type: ignore[arg-type]
    assert refused_fields(message) == [field]


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": math.nan}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"top_k": 1001}, "top_k"),
        ({"logprobs": 21}, "logprobs"),
        ({"min_tokens": 2**31}, "min_tokens"),
        ({"stop_token_ids": (1000,)}, "stop_token_ids"),
        ({"stop_token_ids": (1,) * 65}, "stop_token_ids"),
        ({"logit_bias": ((1000, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, -math.inf),)}, "logit_bias[1]"),
        ({"logit_bias": tuple((token, 1.0) for token in range(1025))}, "logit_bias"),
    ],
)
def test_work_whose_sampling_would_hurt_the_engine_is_refused_by_parameter(
    parameters: dict[str, object], field: str
) -> None:
    assert refused_fields(work_to_proto(make_work(**parameters))) == [f"sampling.{field}"]


def test_work_may_end_before_its_min_tokens_because_the_pools_can_be_the_limit() -> None:
    work = make_work(min_tokens=6, max_tokens=5)
    assert work_from_proto(work_to_proto(work), LIMITS).sampling == work.sampling


def test_lists_that_are_too_long_are_refused_before_their_entries_are_read() -> None:
    message = inference_pb2.SamplingParams(stop_token_ids=[2**32 - 1] * 1_000_000)
    began_s = time.monotonic()
    with pytest.raises(InvalidRequestError, match="has 1000000 entries, at most 64") as caught:
        sampling_from_request(message)
    assert time.monotonic() - began_s < 0.1
    assert len(caught.value.violations) == 1


def test_work_without_seed_or_length_is_refused() -> None:
    message = work_to_proto(make_work(seed=None, max_tokens=None))
    assert refused_fields(message) == ["sampling.seed", "sampling.max_tokens"]


def test_token_ids_name_their_field_when_wrong() -> None:
    assert token_ids_from_proto([], "ids").dtype == np.int32
    with pytest.raises(InvalidRequestError, match="ids: has the token id 2147483648"):
        token_ids_from_proto([1, 2**31], "ids")
    with pytest.raises(InvalidRequestError, match="ids: has the token id 7, over 6"):
        token_ids_from_proto([1, 7], "ids", vocab_size=7)


def test_finish_reasons_are_those_of_the_proto_and_none_is_unspecified() -> None:
    for name, value in inference_pb2.FinishReason.items():
        reason = finish_reason_from_proto(value)
        if reason is None:
            assert name == "FINISH_REASON_UNSPECIFIED"
        else:
            assert name == f"FINISH_REASON_{reason.name}"
            assert finish_reason_to_proto(reason) == value
    assert len(inference_pb2.FinishReason.items()) == len(FinishReason) + 1


def test_failure_reasons_are_those_of_the_proto() -> None:
    for reason in FailureReason:
        value = failure_reason_to_proto(reason)
        assert worker_pb2.FailureReason.Name(value) == f"FAILURE_REASON_{reason.name}"
        assert failure_reason_from_proto(value) is reason
    assert len(worker_pb2.FailureReason.items()) == len(FailureReason) + 1
    unspecified = worker_pb2.FAILURE_REASON_UNSPECIFIED
    assert failure_reason_from_proto(unspecified) is FailureReason.INTERNAL


def test_spans_and_phase_times_come_out_as_they_went_in() -> None:
    span = Span("prefill", "prefill-0", 1.7e9 + 0.123456, 1.7e9 + 1.5, 512)
    assert span_from_proto(span_to_proto(span)) == span
    times = PhaseTimes(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert phase_times_from_proto(phase_times_to_proto(times)) == times


def test_neither_grpc_nor_torch_is_imported() -> None:
    code = "import sys, paceline.wire; print({'grpc', 'torch', 'ray'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout == b"set()\n"
