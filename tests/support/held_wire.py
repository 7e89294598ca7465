"""A wire whose transfers, launches and aborts end when the test lets them."""

import threading
from collections.abc import Callable, Sequence

import torch
from kv_peer import wait_until

from paceline.errors import TransportError
from paceline.kv_transfer.staged_communicator import NUM_STAGING

BLOCK_BYTES = 24
PROMPTLY_S = 1.0


class HeldTransfer:
    """Ends when the test says so."""

    def __init__(self, is_held: bool) -> None:
        self.may_end = not is_held
        self.error: RuntimeError | None = None

    def is_done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.may_end


class HeldWire:
    """Records what is launched. What is named in `held` ends when the test lets it."""

    num_blocks = 2

    def __init__(self, held: Sequence[str] = ()) -> None:
        self.held = held
        self.log: list[str] = []
        self.launched: dict[str, HeldTransfer] = {}
        self.num_aborts = 0
        self.abort_may_return = threading.Event()
        self.abort_may_return.set()
        self.greet_may_return = threading.Event()
        self.greet_may_return.set()
        self.launch_may_return = threading.Event()
        self.launch_may_return.set()
        self.num_launching = 0
        self.num_launching_at_abort: int | None = None

    def greet(self) -> HeldTransfer:
        self.num_launching += 1
        assert self.greet_may_return.wait(10.0)
        self.num_launching -= 1
        return self._launch("greet")

    def allocate(self, num_blocks: int) -> torch.Tensor:
        return torch.empty((num_blocks, BLOCK_BYTES), dtype=torch.uint8)

    def upload(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids)

    def send(self, blocks: torch.Tensor, ids: torch.Tensor, buffer: int) -> HeldTransfer:
        return self._launch_slowly(f"send {ids.tolist()} from {buffer}")

    def receive(self, num_blocks: int, buffer: int) -> HeldTransfer:
        return self._launch_slowly(f"receive {num_blocks} into {buffer}")

    def scatter(self, buffer: int, blocks: torch.Tensor, ids: torch.Tensor) -> HeldTransfer:
        return self._launch(f"scatter {buffer} to {ids.tolist()}")

    def abort(self) -> None:
        self.num_launching_at_abort = self.num_launching
        self.num_aborts += 1
        assert self.abort_may_return.wait(10.0)
        for name, transfer in list(self.launched.items()):
            if not name.startswith("scatter"):  # it is this side's own work
                transfer.may_end = True

    def let(self, name: str) -> None:
        """Wait until this is launched and let it end."""
        wait_until(lambda: name in self.log)
        self.launched[name].may_end = True

    def _launch_slowly(self, name: str) -> HeldTransfer:
        self.num_launching += 1
        assert self.launch_may_return.wait(10.0)
        self.num_launching -= 1
        return self._launch(name)

    def _launch(self, name: str) -> HeldTransfer:
        assert len([n for n, t in self.launched.items() if not t.may_end]) < NUM_STAGING + 1
        transfer = self.launched[name] = HeldTransfer(
            any(name.startswith(held) for held in self.held)
        )
        self.log.append(name)
        return transfer


class Call:
    """A call on a thread of its own, and what it raised."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self.result: object = None
        self._run = run
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        try:
            self.result = self._run()
        except (TransportError, RuntimeError) as error:
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float = PROMPTLY_S) -> None:
        self._thread.join(timeout_s)
        assert not self.is_running, f"not back within {timeout_s} s"


def on_thread(name: str, run: Callable[[], None]) -> None:
    threading.Thread(target=run, name=name, daemon=True).start()


def assert_failed(call: Call, reason: str) -> None:
    assert isinstance(call.error, TransportError | RuntimeError)
    assert reason in str(call.error)
