"""The benchmark of faults notices what it is for; its runs need a deployment."""

import pytest

from paceline.bench.faults.deployment import Control
from paceline.bench.faults.requests import make_requests
from paceline.bench.faults.streams import ON_THE_WAY_S, Answer, Gap, Streams
from paceline.bench.faults.watch import READY, STARTING, Watch
from paceline.v1 import control_pb2
from paceline.v1 import inference_pb2 as pb


def message(*tokens: int, first: int = 0, choice: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        choice=choice,
        tokens=[
            pb.Token(index=index, token_id=token, logprob=-1.0)
            for index, token in enumerate(tokens, first)
        ],
    )


def answer(*tokens: int) -> Answer:
    made = Answer()
    assert made.take(message(*tokens)) is None
    return made


@pytest.mark.parametrize(
    ("got", "words"),
    [
        (answer(5, 6, 7), None),
        (answer(5, 9, 7), "differs from token 1 on"),
        (answer(5, 6), "differs from token 2 on"),
        (answer(5, 6, 7, 8), "differs from token 3 on"),
    ],
)
def test_an_answer_that_differs_is_told_from_its_first_other_token(
    got: Answer, words: str | None
) -> None:
    difference = got.difference(answer(5, 6, 7))
    assert difference is None if words is None else words in str(difference)


def test_a_gap_a_repeated_token_and_another_logprob_are_noticed() -> None:
    assert "token 3 came where 2 was due" in str(answer(5, 6).take(message(8, first=3)))
    assert "token 1 came where 2 was due" in str(answer(5, 6).take(message(6, first=1)))
    other = answer(5, 6)
    other.logprobs[0][1] = -1.1
    assert "log-probabilities" in str(other.difference(answer(5, 6)))


def test_requests_are_the_same_for_a_seed_and_of_every_kind() -> None:
    requests = make_requests(36, seed=1)
    assert requests == make_requests(36, seed=1)
    assert requests != make_requests(36, seed=2)
    samplings = [request.sampling for request in requests]
    assert any(sampling.n == 3 for sampling in samplings)
    assert any(sampling.max_tokens == 1 for sampling in samplings)
    assert any(sampling.HasField("logprobs") for sampling in samplings)
    assert any(sampling.repetition_penalty > 1 for sampling in samplings)


def test_the_longest_gap_is_that_of_the_streams_which_the_fault_held_up() -> None:
    streams = Streams("here:1", [])
    streams.gaps = [
        Gap(8.0, 9.9),
        Gap(9.9, 11.0),
        Gap(10.0 + ON_THE_WAY_S / 2, 13.0),
        Gap(10.5, 20),
    ]
    assert streams.longest_gap_s(10.0) == 3.0
    assert streams.longest_gap_s(30.0) == 0.0


async def test_what_is_still_held_at_the_end_is_a_leak() -> None:
    control = Control("here:1")
    watch = Watch(control)
    whole = control_pb2.Process(worker_id="decode-0", state=READY, num_blocks=9, num_free_blocks=9)
    watch.processes = {"decode-0": whole}
    assert watch.leaks() == []
    for changes in ({"num_running": 1}, {"num_free_blocks": 8}, {"state": STARTING}):
        changed = control_pb2.Process()
        changed.CopyFrom(whole)
        changed.MergeFrom(control_pb2.Process(**changes))
        watch.processes = {"decode-0": changed}
        assert len(watch.leaks()) == 1
    await control.close()
