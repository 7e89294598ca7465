"""Router, prefill and decode workers with every message between them delivered in random order.

Real: dispatcher, router link, sessions, both cores and schedulers, leases, both ends of KV sessions
and imports. Simulated: the model, the bytes on the wire, threads (any may be slow) and time. Each
line keeps its order and nothing else does. Streams break, leases expire, clients go away. A read
copies one block at a time, whatever the owner does with that block meanwhile.

A frozen worker does nothing,
and its router has to notice.

What must hold: every token that reaches a client is the right one, no engine thread raises, and in
the end everybody is done and nothing is held.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from router_requests import make_active_request
from simulated_runner import GARBAGE, SimulatedHandle, SimulatedRunner, _mix

from paceline.decode_worker.core import DecodeCore
from paceline.decode_worker.intake import Intake
from paceline.decode_worker.scheduler import DecodeScheduler
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import CachedBlock, PrefixCache
from paceline.errors import CancelledError
from paceline.failpoints import Failpoints
from paceline.internal.v1 import kv_pb2, worker_pb2
from paceline.kv_transfer.lease import LeaseTable
from paceline.kv_transfer.read_handle import PendingRead
from paceline.prefill_worker.core import PrefillCore
from paceline.prefill_worker.scheduler import PrefillScheduler
from paceline.request import AttemptKey, Work
from paceline.router.active_request import ActiveRequest
from paceline.router.capacity import WorkerPool
from paceline.router.dispatch import Dispatcher
from paceline.router.lag import LoopLag
from paceline.router.settings import RouterSettings
from paceline.router.worker_link import WorkerLink, _load
from paceline.router.worker_messages import WorkerClaim
from paceline.router.worker_view import Role, WorkerMember, WorkerView
from paceline.silence import Company, Silence
from paceline.worker import kv_owner, kv_reader
from paceline.worker.core import Core, Peer
from paceline.worker.identity import WorkerIdentity
from paceline.worker.mailbox import Mailbox
from paceline.worker.outgoing import Outgoing
from paceline.worker.router_sessions import RouterSessions, load_message

BLOCK_TOKENS = 4
EOS = 5
VOCAB = 40
LEASE_TTL_S = 5.0
PROMISE_TTL_S = 20.0
SILENCE_LIMIT_S = 2.0
FAULTS = ("kv", "router", "read", "expire", "cancel", "beat", "beat", "absent", "refuse")

HEARTBEAT = worker_pb2.SessionResponse(step=worker_pb2.StepReport())


class SimLoop:
    """An event loop whose callbacks run when the test says so, in order; timers at their time."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.ready: deque[Callable[[], object]] = deque()
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def call_soon_threadsafe(self, callback: Callable[..., object], *values: object) -> None:
        self.ready.append(lambda: callback(*values))

    call_soon = call_soon_threadsafe

    def call_later(self, delay_s: float, callback: Callable[..., object], *values: object) -> None:
        self.timers.append((self._world.now + delay_s, lambda: callback(*values)))

    def run_one(self) -> None:
        self.ready.popleft()()

    def run_timers(self) -> None:
        due = [timer for timer in self.timers if timer[0] <= self._world.now]
        self.timers = [timer for timer in self.timers if timer[0] > self._world.now]
        for _, callback in due:
            self.ready.append(callback)


class HonestRunner(SimulatedRunner):
    """Computes from whatever KV it finds, like a model: wrong KV gives wrong tokens, no error."""

    def _require_kv(self, slot: int, num_tokens: int, when: str) -> None:
        sequence = self._sequence(slot)
        table = sequence.block_table[: -(-num_tokens // self.block_tokens)]
        assert (table >= 0).all()
        found = self.pool[table].reshape(-1)[:num_tokens].tolist()
        if found != sequence.kv[:num_tokens]:
            sequence.kv[:num_tokens] = found
            for position in range(max(num_tokens, 1), len(sequence.kv)):
                sequence.kv[position] = _mix(sequence.kv[position - 1], sequence.tokens[position])


class SimWorker:
    """What both kinds of worker have."""

    core: Core

    def __init__(
        self,
        world: "World",
        worker_id: str,
        role: Role,
        num_blocks: int,
        max_num_seqs: int,
        local_prefill_tokens: int = 0,
    ) -> None:
        self.world = world
        self.peer = Peer(worker_id, 1, worker_id)
        self.member = WorkerMember(worker_id, role, 1, worker_id)
        self.pool = WorkerPool(num_blocks, BLOCK_TOKENS, max_num_seqs, local_prefill_tokens)
        self.loop = SimLoop(world)
        self.mailbox = Mailbox()
        self.sessions = RouterSessions()
        self.allocator = BlockAllocator(num_blocks)
        self.prefix_cache = PrefixCache(self.allocator, BLOCK_TOKENS, b"root key of tests")
        kind = HonestRunner if role is Role.DECODE else SimulatedRunner
        # Half of the workers launch a step before the result of the one before it, like GPUs.
        self.overlap = world.random.random() < 0.5
        self.in_flight: SimulatedHandle | None = None
        self.is_frozen = False
        self.runner = kind(
            max_num_seqs, VOCAB, num_blocks, BLOCK_TOKENS, (EOS,), runs_late=self.overlap
        )
        self.identity = WorkerIdentity(
            worker_id=worker_id,
            incarnation=1,
            num_blocks=num_blocks,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=max_num_seqs,
            local_prefill_tokens=local_prefill_tokens,
            layout_fingerprint=b"layout",
            layout_description="layout",
        )

    def round(self) -> None:
        now = self.world.now
        self.mailbox.run_calls(now)
        self.core.tick(now)
        plan = self.core.plan(now)
        launched = self.runner.launch(plan) if plan is not None else None
        ready, self.in_flight = (self.in_flight, launched) if self.overlap else (launched, None)
        if ready is not None:
            self.core.apply(self.runner.finish(ready, self.allocator), now)
        self.sessions.report(self.core, now)
        self.core.check_integrity()
        # Whoever still reads a block that has been freed shall notice.
        self.runner.pool[self.allocator._free] = GARBAGE

    def check_cache(self) -> None:
        """Every cached block holds the KV of its tokens, after those of its parents."""
        for block in self.prefix_cache._by_key.values():
            tokens: list[int] = []
            place: CachedBlock | None = block
            while place is not None:
                tokens[:0] = np.frombuffer(place.tokens, dtype=np.int32).tolist()
                place = place.parent
            expected = self.runner.model.kv_of(tokens)[-BLOCK_TOKENS:]
            found = self.runner.pool[block.block_id].tolist()
            assert found == expected, f"{self.peer.worker_id} caches wrong KV: {block.block_id}"


class SimPrefill(SimWorker):
    def __init__(self, world: "World", worker_id: str, num_blocks: int, lease_ttl_s: float) -> None:
        super().__init__(world, worker_id, Role.PREFILL, num_blocks, 6)
        self.leases = LeaseTable(self.allocator, lease_ttl_s)
        scheduler: PrefillScheduler[int] = PrefillScheduler(
            self.allocator,
            self.prefix_cache,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=6,
            max_num_batched_tokens=7,
            age_bound_s=5.0,
            max_model_len=64,
            eos_token_ids=(EOS,),
        )
        core = PrefillCore(
            scheduler,
            self.leases,
            self.sessions,
            Failpoints(),
            worker_id=worker_id,
            unix_offset_s=0.0,
        )
        self.core = core
        owner: Any = kv_owner.KvOwner(
            self.identity,
            self.leases,
            None,  # type: ignore[arg-type]
            self.mailbox,
            core.reader_lost,
            core.released,
            Failpoints(),
        )
        owner._loop = self.loop
        self.owner = owner
        core.notify_changed = owner.notify_changed


class SimDecode(SimWorker):
    def __init__(
        self, world: "World", worker_id: str, num_blocks: int, local_prefill_tokens: int
    ) -> None:
        super().__init__(world, worker_id, Role.DECODE, num_blocks, 6, local_prefill_tokens)
        scheduler = DecodeScheduler(
            self.allocator,
            self.prefix_cache,
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=6,
            max_num_batched_tokens=16,
            local_prefill_tokens=local_prefill_tokens,
            watermark_blocks=0,
            promise_ttl_s=PROMISE_TTL_S,
            prefill_age_bound_s=5.0,
            eos_token_ids=(EOS,),
            max_model_len=64,
        )
        core = DecodeCore(
            scheduler,
            self.sessions,
            Failpoints(),
            worker_id=worker_id,
            block_tokens=BLOCK_TOKENS,
            transport="sim",
            unix_offset_s=0.0,
        )
        self.core = core
        reader: Any = kv_reader.KvReader(
            self.identity,
            SimTransport(self),  # type: ignore[arg-type]
            Intake(core, self.mailbox),
            Failpoints(),
            heartbeat_s=1.0,
            silence_limit_s=2.5,
            verdict_timeout_s=10.0,
            vocab_size=2**31,
        )
        reader._loop = self.loop
        self.reader = reader
        self.scheduler = scheduler
        core.importer = reader

    def check_held(self, key: AttemptKey) -> None:
        """A context whose reads the owner has confirmed is here, and right."""
        attempt = self.scheduler._roster.attempts.get(key)
        if attempt is None or not attempt.owns_blocks:
            return  # ended or preempted meanwhile
        expected = self.runner.model.kv_of(attempt.context)
        found = self.runner.pool[list(attempt.context_block_ids)].reshape(-1)[: len(expected)]
        assert found.tolist() == expected, f"{key} is HELD, and its KV is wrong"


@dataclass(eq=False)
class SimRead:
    """A read that copies a block at a time."""

    handle: PendingRead
    pairs: deque[tuple[int, int]]


class SimTransport:
    name = "sim"

    def __init__(self, reader: SimDecode) -> None:
        self.reader = reader

    def connect(
        self, owner: str, owner_incarnation: int, endpoint: bytes, channel: object
    ) -> "SimConnection":
        connection = SimConnection(self.reader, self.reader.world.prefills[endpoint.decode()])
        self.reader.world.connections.append(connection)
        return connection


class SimConnection:
    def __init__(self, reader: SimDecode, owner: SimPrefill) -> None:
        self.reader, self.owner = reader, owner
        self.reads: list[SimRead] = []
        self.is_closed = False

    def read(self, lease_id: int, sources: Sequence[int], targets: Sequence[int]) -> PendingRead:
        handle = PendingRead(len(sources))
        if self.is_closed:
            handle.fail("closed")
        else:
            self.reads.append(SimRead(handle, deque(zip(sources, targets, strict=True))))
        return handle

    def progress(self, read: SimRead, *, fails: bool) -> None:
        if fails:
            self.reads.remove(read)
            read.handle.fail("cable cut")
        elif read.pairs:
            source, target = read.pairs.popleft()
            references = self.reader.allocator.num_references(target)
            assert references == 1, f"a read writes block {target}, which has {references} users"
            assert not self.reader.allocator.is_cached(target), f"a read writes cached {target}"
            self.reader.runner.pool[target] = self.owner.runner.pool[source]
        else:
            self.reads.remove(read)
            read.handle.finish()

    def close(self) -> None:
        self.is_closed = True
        reads, self.reads = self.reads, []
        for read in reads:
            read.handle.fail("the connection was closed")


class SimLink(kv_reader.OwnerLink):
    """The real link; its stream is a pair of lines of the world."""

    world: "World"

    def _take(self, response: kv_pb2.ReadLeasesResponse) -> None:
        if response.WhichOneof("message") == "verdict" and response.verdict.held:
            found = self._by_lease.get(response.verdict.lease_id)
            if found is not None:
                self.world.decodes[self._identity.worker_id].check_held(found.key)
        super()._take(response)

    def __init__(self, owner: Peer, identity: WorkerIdentity, *values: Any, **named: Any) -> None:
        super().__init__(owner, identity, *values, **named)
        self._task.cancel()
        world = SimLink.world
        self._loop = world.decodes[identity.worker_id].loop  # type: ignore[assignment]
        world.kv_streams.append(KvStream(world, self, world.prefills[owner.worker_id]))


class KvStream:
    """A KV session's stream; each side sees its end by itself."""

    def __init__(self, world: "World", link: SimLink, owner: SimPrefill) -> None:
        self.link, self.owner = link, owner
        self.reader_name = f"{link._identity.worker_id}.{link._identity.incarnation}"
        self.world = world
        self.session: Any = None
        self.is_broken = self.owner_saw_end = False
        self.to_reader: Outgoing[kv_pb2.ReadLeasesResponse] = Outgoing()

    @property
    def is_over(self) -> bool:
        return self.is_broken and self.owner_saw_end and self.link.is_closed

    def open(self) -> None:
        """As in `KvOwner.ReadLeases`."""
        owner = self.owner.owner
        self.session = kv_owner._ReaderSession(self.reader_name, self.to_reader)
        owner._begin(self.session)
        welcome = kv_pb2.OwnerWelcome(
            worker_id=self.owner.peer.worker_id,
            incarnation=1,
            transport_endpoint=self.owner.peer.worker_id.encode(),
        )
        self.to_reader.send(kv_pb2.ReadLeasesResponse(welcome=welcome))

    def end_at_owner(self) -> None:
        owner = self.owner.owner
        self.owner_saw_end = True
        self.to_reader.close()
        if self.session is not None:
            owner._end(self.session)

    def moves(self) -> list[Callable[[], object]]:
        moves: list[Callable[[], object]] = []
        if not self.owner_saw_end and not self.owner.is_frozen:
            if self.is_broken:
                moves.append(self.end_at_owner)
            elif self.session is None:
                moves.append(self.open)
            elif self.link._outgoing._waiting:
                moves.append(self.deliver_to_owner)
        if self.world.decodes[self.link._identity.worker_id].is_frozen:
            pass
        elif not self.link.is_closed:
            if self.is_broken:
                moves.append(lambda: self.link.fail("the stream broke"))
            elif self.to_reader._waiting:
                moves.append(lambda: self.link._take(self.to_reader._waiting.popleft()))
        elif not self.is_broken:
            self.is_broken = True
        return moves

    def deliver_to_owner(self) -> None:
        request = self.link._outgoing._waiting.popleft()
        self.owner.owner._take(self.session, None, request)


class RouterStream:
    """The router's stream to one worker."""

    def __init__(self, world: "World", worker: SimWorker, number: int) -> None:
        self.world, self.worker, self.number = world, worker, number
        self.to_worker: deque[Callable[[], None]] = deque()
        self.to_router: Outgoing[Any] = Outgoing()
        self.is_broken = self.router_saw_end = self.worker_saw_end = False
        self.is_open = False
        self.refuses_next = False
        self.silence = Silence(SILENCE_LIMIT_S, world.now)
        worker.mailbox.post(self._open_at_worker)

    def _open_at_worker(self, now: float) -> None:
        """As in `WorkerServicer._open`."""
        self.worker.sessions.open(self.number, self.to_router)
        load = self.worker.sessions.first_load(self.worker.core, now)
        self.to_router.send(("welcome", load_message(load, 0)))

    def dispatch(self, work: Work, peer: Peer | None) -> None:
        def call(now: float) -> None:
            sessions = self.worker.sessions
            sessions.count_dispatch(self.number)
            if self.refuses_next:
                self.refuses_next = False
                sessions.send_admission(
                    self.number, work.key, admitted=False, message="scripted", cached_tokens=0
                )
            else:
                self.worker.core.dispatch(self.number, work, peer, now)

        self.to_worker.append(lambda: self.worker.mailbox.post(call))

    def claim(self, claim: WorkerClaim) -> None:
        def call(now: float) -> None:
            self.worker.sessions.claim(self.number, *claim, now)

        self.to_worker.append(lambda: self.worker.mailbox.post(call))

    def cancel(self, key: AttemptKey, choices: tuple[int, ...]) -> None:
        def call(now: float) -> None:
            self.worker.core.cancel(self.number, key, choices, now)

        self.to_worker.append(lambda: self.worker.mailbox.post(call))

    def moves(self) -> list[Callable[[], object]]:
        moves: list[Callable[[], object]] = []
        if not self.worker_saw_end and not self.worker.is_frozen:
            if self.is_broken:
                moves.append(self._end_at_worker)
            elif self.to_worker:
                moves.append(self._deliver_to_worker)
        if not self.router_saw_end:
            if self.is_broken:
                moves.append(self._end_at_router)
            elif self.to_router._waiting:
                moves.append(self._deliver_to_router)
        return moves

    def _deliver_to_worker(self) -> None:
        deliver = self.to_worker.popleft()
        deliver()

    def _end_at_worker(self) -> None:
        """As in `WorkerServicer._end`."""
        self.worker_saw_end = True

        def call(now: float) -> None:
            self.worker.sessions.close(self.number)
            self.worker.core.end_session(self.number, now)

        self.worker.mailbox.post(call)

    def _end_at_router(self) -> None:
        self.router_saw_end = True
        self.world.dispatcher.worker_lost(self.worker.member.worker_id, self.world.now)
        self.world.connect(self.worker)

    def look(self) -> None:
        """As in `WorkerLink._read`."""
        if self.is_open and self.silence.is_too_long(self.world.now):
            self.is_broken = True

    def beat(self) -> None:
        """As the worker's io thread does, whatever its engine does."""
        if self.is_open and not self.is_broken and not self.worker.is_frozen:
            self.to_router.send(HEARTBEAT)

    def _deliver_to_router(self) -> None:
        self.silence.heard()
        message = self.to_router._waiting.popleft()
        if isinstance(message, tuple):
            self.is_open = True
            view = WorkerView(self.worker.member, self.worker.pool, _load(message[1]))
            self.world.dispatcher.worker_joined(view, self.world.now)
        else:
            self.world.links[self.worker.member.worker_id]._take(message)


class World:
    """Everything; implements the dispatcher's commands."""

    def __init__(
        self,
        seed: int,
        num_blocks: int,
        local_prefill_tokens: int,
        max_tokens: int,
        lease_ttl_s: float,
    ) -> None:
        self.max_tokens = max_tokens
        self.random = random.Random(seed)
        self.now = 100.0
        self.prefills: dict[str, SimPrefill] = {}
        self.decodes: dict[str, SimDecode] = {}
        self.kv_streams: list[KvStream] = []
        self.connections: list[SimConnection] = []
        self.streams: dict[str, RouterStream] = {}
        self.links: dict[str, WorkerLink] = {}
        self.old_streams: list[RouterStream] = []
        self.num_streams = 0
        # Faults come at random, and so in rows that no request is to blame for.
        settings = RouterSettings(max_lone_deaths=10**6, max_setbacks=64, max_internal_failures=1)
        self.dispatcher = Dispatcher(settings, self)
        self.requests: list[ActiveRequest] = []
        SimLink.world = self
        for number in range(2):
            prefill = SimPrefill(self, f"prefill-{number}", num_blocks, lease_ttl_s)
            self._add(prefill, self.prefills)
            decode = SimDecode(self, f"decode-{number}", num_blocks, local_prefill_tokens)
            self._add(decode, self.decodes)

    def _add(self, worker: Any, workers: dict[str, Any]) -> None:
        worker_id = worker.member.worker_id
        workers[worker_id] = worker
        self.links[worker_id] = WorkerLink(
            worker.member,
            router_id="router-0",
            router_incarnation=1,
            settings=RouterSettings(),
            dispatcher=self.dispatcher,
            company=Company(),
            lag=LoopLag(),
            clock=lambda: self.now,
            on_change=lambda: None,
        )
        self.connect(worker)

    def connect(self, worker: SimWorker) -> None:
        self.num_streams += 1
        worker_id = worker.member.worker_id
        if worker_id in self.streams:
            self.old_streams.append(self.streams[worker_id])
        self.streams[worker_id] = RouterStream(self, worker, self.num_streams)

    @property
    def workers(self) -> list[Any]:
        return [*self.prefills.values(), *self.decodes.values()]

    # Commands of the dispatcher.

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        peer = Peer(reader.worker_id, reader.incarnation, reader.address)
        self.streams[worker_id].dispatch(work, peer)

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        peer = None if source is None else Peer(source.worker_id, 1, source.address)
        self.streams[worker_id].dispatch(work, peer)

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        self.streams[worker_id].claim(claim)

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        self.streams[worker_id].cancel(key, choices)

    # Time.

    def moves(self) -> list[Callable[[], object]]:
        moves: list[Callable[[], object]] = []
        for worker in self.workers:
            if worker.is_frozen:
                continue
            moves += [worker.round, worker.round]
            if worker.loop.ready:
                moves += [worker.loop.run_one, worker.loop.run_one]
        for stream in (*self.streams.values(), *self.old_streams):
            moves += stream.moves()
        for kv_stream in self.kv_streams:
            moves += kv_stream.moves()
        for connection in self.connections:
            if connection.reader.is_frozen:
                continue
            for read in connection.reads:
                moves.append(lambda c=connection, r=read: c.progress(r, fails=False))
        self.kv_streams = [stream for stream in self.kv_streams if not stream.is_over]
        return moves

    def step(self) -> None:
        self.random.choice(self.moves())()
        for request in self.requests:
            self.check(request)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for worker in self.workers:
            if not worker.is_frozen:
                worker.loop.run_timers()
        for router_stream in self.streams.values():
            router_stream.look()
            router_stream.beat()
        self.dispatcher.dispatch(self.now)

    def beat(self) -> None:
        """Send the readers' heartbeats."""
        for stream in self.kv_streams:
            reader = self.decodes[stream.link._identity.worker_id]
            if not stream.link.is_closed and not reader.is_frozen:
                stream.link.send_heartbeat()

    # Faults.

    def fault(self, kinds: Sequence[str]) -> None:
        kind = self.random.choice(kinds)
        open_kv = [stream for stream in self.kv_streams if not stream.is_broken]
        if kind == "kv" and open_kv:
            self.random.choice(open_kv).is_broken = True
        elif kind == "router":
            stream = self.random.choice(list(self.streams.values()))
            if stream.is_open:
                stream.is_broken = True
        elif kind == "read":
            reading = [c for c in self.connections if c.reads]
            if reading:
                connection = self.random.choice(reading)
                connection.progress(self.random.choice(connection.reads), fails=True)
        elif kind == "expire":
            self.pass_time(self.random.choice((1.0, LEASE_TTL_S + 1, PROMISE_TTL_S + 1)))
        elif kind == "cancel" and self.requests:
            request = self.random.choice(self.requests)
            self.dispatcher.fail(request, CancelledError("gone"), self.now)
        elif kind == "refuse":
            self.random.choice(list(self.streams.values())).refuses_next = True
        elif kind == "freeze":
            # One of each kind stays well, so that requests can go on.
            self.random.choice(
                (self.prefills["prefill-0"], self.decodes["decode-0"])
            ).is_frozen = True
        elif kind == "beat":
            self.beat()
        elif kind == "absent":
            decode = self.random.choice(list(self.decodes.values()))
            name = self.random.choice(list(self.prefills.values())).peer.name
            live = {worker.peer.name for worker in self.workers} - {name}
            decode.loop.call_soon_threadsafe(decode.reader.drop_absent, live)

    # Requests.

    def submit(self, number: int) -> None:
        pick = self.random
        prefix = [11, 12, 13, 14, 15, 16, 17, 18][: pick.choice((0, 4, 8))]
        prompt = prefix + [pick.randrange(6, VOCAB) for _ in range(pick.randrange(1, 14))]
        request = make_active_request(
            f"q{number}",
            prompt,
            n=pick.choice((1, 1, 2, 3)),
            max_tokens=pick.choice((1, 2, 6, self.max_tokens)),
            arrived_s=self.now,
        )
        self.requests.append(request)
        self.dispatcher.submit(request, self.now)

    def check(self, request: ActiveRequest) -> None:
        journal = request.journal
        assert request.error is None or isinstance(request.error, CancelledError), request.error
        for choice in journal.choices:
            if choice.output:
                model = next(iter(self.prefills.values())).runner.model
                expected = model.reference_output(
                    journal.prompt, journal.sampling, choice.choice, len(choice.output)
                )
                assert choice.output == expected, f"{request.request_id}: a wrong token"

    def settle(self, max_num_steps: int) -> None:
        """Let everything come to its end without further faults.

        Requests have to end although a worker is frozen; what it holds, once it goes on.
        """
        for number in range(max_num_steps):
            if number % 200 == 199:
                self.pass_time(0.3)
                if all(request.is_done for request in self.requests):
                    if self.is_quiet():
                        break
                    for worker in self.workers:
                        worker.is_frozen = False
                self.beat()
            self.step()
        undone = [request.request_id for request in self.requests if not request.is_done]
        assert not undone, f"{undone} hang"
        for worker in self.workers:
            assert worker.core.is_idle, f"{worker.peer.worker_id} still holds something"
            free = worker.allocator.num_available
            assert free == worker.pool.num_blocks, f"{worker.peer.worker_id}: {free} free"
            worker.check_cache()
        for decode in self.decodes.values():
            assert not decode.reader._owners
            assert not any(link._imports for link in decode.reader._links.values())
            assert not any(link._by_lease for link in decode.reader._links.values())
        for prefill in self.prefills.values():
            assert prefill.leases.num_undecided == 0
            for session in prefill.owner._sessions.values():
                assert not session.subscriptions, "subscriptions are left"
                assert not session.unconfirmed, "leases are left without a confirmation"
        assert not self.dispatcher.running.streams
        assert not self.dispatcher.running.attempts
        for request in self.requests:
            self.check(request)
            if request.error is None:
                assert request.journal.is_finished

    def is_quiet(self) -> bool:
        if any(stream.moves() for stream in self.kv_streams):
            return False
        return all(
            not w.is_frozen and w.core.is_idle and not w.loop.ready and not w.mailbox._calls
            for w in self.workers
        )


async def run_world(
    seed: int,
    *,
    num_blocks: int,
    fault_share: float,
    num_steps: int,
    monkeypatch: Any,
    num_requests: int = 12,
    local_prefill_tokens: int = 0,
    max_tokens: int = 12,
    lease_ttl_s: float = LEASE_TTL_S,
    faults: Sequence[str] = FAULTS,
    num_steps_to_settle: int = 60_000,
) -> World:
    monkeypatch.setattr(kv_reader, "OwnerLink", SimLink)
    monkeypatch.setattr(kv_owner, "time", _Clock(lambda: SimLink.world.now))
    world = World(seed, num_blocks, local_prefill_tokens, max_tokens, lease_ttl_s)
    for number in range(num_steps):
        if number % (num_steps // num_requests) == 0:
            world.submit(number)
        if world.random.random() < fault_share:
            world.fault(faults)
        if number % 20 == 0:
            world.pass_time(0.1)
        world.step()
        if number % 500 == 0:
            await asyncio.sleep(0)
    world.settle(num_steps_to_settle)
    return world


class _Clock:
    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic
