"""What a router tells workers while its next work waits."""

from router_requests import make_active_request

from paceline.request import AttemptKey, Work
from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, WorkerPool
from paceline.router.dispatch import Dispatcher
from paceline.router.settings import RouterSettings
from paceline.router.worker_messages import WorkerClaim
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView

NOTHING = WorkerClaim(0, 0, 0.0, False)
FULL = WorkerLoad(0, 0)


class Recorder:
    def __init__(self) -> None:
        self.claims: list[tuple[str, WorkerClaim]] = []
        self.admitted: list[str] = []

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        raise AssertionError("there is no prefill worker")

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        self.admitted.append(worker_id)

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        pass

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        self.claims.append((worker_id, claim))

    def take(self) -> list[tuple[str, WorkerClaim]]:
        claims, self.claims = self.claims, []
        return claims


def make_waiting() -> tuple[Dispatcher, Recorder]:
    """Two full decode workers, and a request that arrives after 1 s."""
    recorder = Recorder()
    dispatcher = Dispatcher(RouterSettings(), recorder)
    for name in ("decode-0", "decode-1"):
        pool = WorkerPool(100, 16, 8, UNLIMITED_LOCAL_PREFILL)
        dispatcher.worker_joined(WorkerView(WorkerMember(name, Role.DECODE, 1, ""), pool, FULL), 0)
    dispatcher.submit(make_active_request("a", range(1, 41), arrived_s=1.0), 1.0)
    return dispatcher, recorder


def test_claim_holds_at_one_worker_and_is_repeated_only_to_renew_it() -> None:
    dispatcher, recorder = make_waiting()
    for name in ("decode-1", "decode-0"):
        dispatcher.load_changed(name, FULL, 1.5)
    for name in ("decode-1", "decode-0"):
        dispatcher.load_changed(name, FULL, 2.0)
    first = WorkerClaim(4, 1, 0.5, True)
    assert recorder.take() == [("decode-1", first), ("decode-0", first._replace(holds=False))]
    dispatcher.load_changed("decode-1", FULL, 2.5)
    assert recorder.take() == [("decode-1", WorkerClaim(4, 1, 1.5, True))]


def test_hold_ends_at_once_when_the_work_goes_elsewhere() -> None:
    dispatcher, recorder = make_waiting()
    for name in ("decode-1", "decode-0"):
        dispatcher.load_changed(name, FULL, 1.5)
    recorder.take()
    dispatcher.load_changed("decode-0", WorkerLoad(100, 8), 1.6)
    assert recorder.admitted == ["decode-0"]
    assert recorder.take() == [("decode-1", NOTHING)]


def test_claim_is_withdrawn_when_its_request_has_ended() -> None:
    dispatcher, recorder = make_waiting()
    dispatcher.load_changed("decode-1", FULL, 1.5)
    recorder.take()
    (request,) = dispatcher.requests.values()
    dispatcher.expire(request, "0.6 s", 1.6)
    dispatcher.load_changed("decode-1", FULL, 1.7)
    assert recorder.take() == [("decode-1", NOTHING)]


def test_hold_moves_to_another_worker_when_its_worker_is_lost() -> None:
    dispatcher, recorder = make_waiting()
    for name in ("decode-1", "decode-0"):
        dispatcher.load_changed(name, FULL, 1.5)
    recorder.take()
    dispatcher.worker_lost("decode-1", 1.6)
    dispatcher.load_changed("decode-0", FULL, 1.7)
    ((worker_id, claim),) = recorder.take()
    assert (worker_id, claim.holds) == ("decode-0", True)
