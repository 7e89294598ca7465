"""A prefill worker keeps nothing of a request for longer than the outcome of its lease."""

import gc
import tracemalloc
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from prefill_simulation import PrefillSimulation, make_work

from paceline.failpoints import Failpoints
from paceline.internal.v1 import kv_pb2
from paceline.kv_transfer.lease import LeaseTable
from paceline.prefill_worker.core import PrefillCore
from paceline.worker import kv_owner
from paceline.worker.core import Peer
from paceline.worker.identity import WorkerIdentity
from paceline.worker.kv_owner import KvOwner, _ReaderSession
from paceline.worker.mailbox import Mailbox
from paceline.worker.outgoing import Outgoing
from paceline.worker.router_sessions import RouterSessions

READER = Peer("decode-0", 1, "127.0.0.1:1")
IDENTITY = WorkerIdentity("prefill-0", 1, 64, 16, 8, 0, b"layout", "16 tokens a block")
NUM_REQUESTS = 500
MAX_GROWTH_BYTES = 48 * NUM_REQUESTS
"""Less than any object that a request could leave behind, and more than what tables vary by."""


class Worker:
    """The real core, leases, KV sessions and router sessions; the model is simulated."""

    def __init__(self) -> None:
        self.simulation = PrefillSimulation(num_blocks=64)
        self.leases = LeaseTable(self.simulation.allocator, 5.0, outcome_retention_s=1.0)
        self.routers = RouterSessions()
        self.to_router: Outgoing[Any] = Outgoing()
        self.routers.open(1, self.to_router)
        scheduler: Any = self.simulation.scheduler
        self.core = PrefillCore(
            scheduler,
            self.leases,
            self.routers,
            Failpoints(),
            worker_id="prefill-0",
            unix_offset_s=0.0,
        )
        self.mailbox = Mailbox()
        transport: Any = None
        self.owner = KvOwner(
            IDENTITY,
            self.leases,
            transport,
            self.mailbox,
            self.core.reader_lost,
            self.core.released,
            Failpoints(),
        )
        self.to_reader: Outgoing[kv_pb2.ReadLeasesResponse] = Outgoing()
        self.session = _ReaderSession(READER.name, self.to_reader)
        self.owner._begin(self.session)
        self.core.notify_changed = self.owner._forward_to_reader
        self.random = Random(1)
        self.now = 0.0
        self.num_requests = 0

    def hear(self, request: kv_pb2.ReadLeasesRequest) -> None:
        peer: Any = None
        self.owner._take(self.session, peer, request)

    def serve(self, *, is_released: bool) -> None:
        """Compute a prompt, which its reader then confirms or gives back."""
        self.num_requests += 1
        self.now += 0.01
        request_id = f"request-{self.num_requests}"
        prompt = [self.random.randrange(6, 900) for _ in range(20)]
        subscribe = kv_pb2.Subscribe(request_id=request_id, attempt=1)
        self.hear(kv_pb2.ReadLeasesRequest(subscribe=subscribe))
        self.core.dispatch(1, make_work(request_id, prompt), READER, self.now)
        while (plan := self.core.plan(self.now)) is not None:
            runner = self.simulation.runner
            result = runner.finish(runner.launch(plan), self.simulation.allocator)
            self.core.apply(result, self.now)
        if is_released:
            release = kv_pb2.Release(request_id=request_id, attempt=1)
            self.hear(kv_pb2.ReadLeasesRequest(release=release))
        else:
            lease_id = next(iter(self.session.unconfirmed))
            confirm = kv_pb2.Confirm(lease_id=lease_id)
            self.hear(kv_pb2.ReadLeasesRequest(confirm=confirm))
        self.mailbox.run_calls(self.now)
        self.core.tick(self.now)
        self.routers.report(self.core, self.now)
        assert self.to_router._waiting
        assert self.to_reader._waiting
        self.to_router._waiting.clear()  # as if they had been sent
        self.to_reader._waiting.clear()


async def test_memory_does_not_grow_with_the_number_of_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker()
    monkeypatch.setattr(kv_owner, "time", SimpleNamespace(monotonic=lambda: worker.now))

    def serve_many(num_requests: int) -> int:
        for number in range(num_requests):
            worker.serve(is_released=number % 4 == 0)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = serve_many(200)
        growth = serve_many(NUM_REQUESTS) - before
    finally:
        tracemalloc.stop()
    assert growth < MAX_GROWTH_BYTES, f"{growth / NUM_REQUESTS:.0f} bytes of each request are left"
    assert worker.core.is_idle
