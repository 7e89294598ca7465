"""What a prefill worker tells its routers, from steps at given times."""

from prefill_simulation import PrefillSimulation, make_work
from recording_routers import RecordingRouters

from paceline.failpoints import Failpoints
from paceline.kv_transfer.lease import LeaseTable
from paceline.prefill_worker.core import PrefillCore
from paceline.request import Span
from paceline.worker.core import Peer


def test_chunks_are_timed_from_their_plan_and_reported_before_the_first_token() -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=64)
    routers = RecordingRouters()
    core = PrefillCore(
        simulation.scheduler,  # type: ignore[arg-type]
        LeaseTable(simulation.allocator, ttl_s=100.0),
        routers,
        Failpoints(),
        worker_id="prefill-0",
        unix_offset_s=1000.0,
    )
    core.dispatch(1, make_work("r", range(100, 180)), Peer("decode-0", 1, "127.0.0.1:1"), now=1.0)
    for planned_s, applied_s in ((4.0, 6.0), (7.0, 7.5)):
        plan = core.plan(planned_s)
        assert plan is not None
        core.apply(simulation.runner.launch(plan).result(), applied_s)
    assert routers.calls == ["admission", "phase prefill", "output"]
    assert routers.spans == [
        Span("prefill", "prefill-0", 1004.0, 1006.0, 64),
        Span("prefill", "prefill-0", 1007.0, 1007.5, 16),
    ]
