"""What a decode worker takes from its routers' sessions, and what it tells them."""

import pytest
from decode_simulation import DecodeSimulation
from recording_routers import RecordingRouters

from paceline.decode_worker.core import DecodeCore
from paceline.failpoints import Failpoints
from paceline.request import Span
from paceline.sampling_params import SamplingParams


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1, ignore_eos=True)


def make_core(simulation: DecodeSimulation, routers: RecordingRouters) -> DecodeCore:
    return DecodeCore(
        simulation.scheduler,
        routers,
        Failpoints(),
        worker_id="decode-0",
        block_tokens=4,
        transport="",
        unix_offset_s=1000.0,
    )


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_a_prompt_computed_here_is_timed_apart_from_decode_and_reported_before_its_token(
    max_tokens: int,
) -> None:
    simulation = DecodeSimulation(max_num_batched_tokens=24)
    routers = RecordingRouters()
    core = make_core(simulation, routers)
    work = simulation.make_work("r", list(range(10, 40)), sampling=sampling(max_tokens))
    core.dispatch(1, work, None, now=1.0)
    for now in range(4, 4 + 2 * (max_tokens + 1), 2):
        plan = core.plan(float(now))
        assert plan is not None
        core.apply(simulation.runner.launch(plan).result(), now + 1.0)
    outputs = ["output"] * max_tokens
    assert routers.calls == ["admission", "phase prefill", *outputs, "phase decode"]
    assert routers.spans == [
        Span("prefill", "decode-0", 1004.0, 1005.0, 24),
        Span("prefill", "decode-0", 1006.0, 1007.0, 6),
        Span("decode", "decode-0", 1007.0, 1007.0 + 2 * (max_tokens - 1), max_tokens),
    ]


def test_a_prompt_that_is_cancelled_while_its_last_chunk_runs_is_not_reported() -> None:
    simulation = DecodeSimulation()
    routers = RecordingRouters()
    core = make_core(simulation, routers)
    work = simulation.make_work("r", list(range(10, 20)), sampling=sampling(3))
    core.dispatch(1, work, None, now=1.0)
    plan = core.plan(2.0)
    assert plan is not None
    core.cancel(1, work.key, (), 3.0)
    core.apply(simulation.runner.launch(plan).result(), 4.0)
    assert routers.calls == ["admission"]


def test_a_session_can_cancel_only_its_own_work() -> None:
    simulation = DecodeSimulation()
    core = make_core(simulation, RecordingRouters())
    work = simulation.make_work("r", list(range(10, 20)))
    core.dispatch(1, work, None, 0.0)
    core.cancel(2, work.key, (), 0.0)
    simulation.scheduler.tidy()
    assert not core.is_idle
    core.cancel(1, work.key, (), 0.0)
    core.tick(0.0)
    simulation.scheduler.tidy()
    assert core.is_idle
