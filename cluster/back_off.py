"""How long to wait before starting again what does not stay up."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Row:
    num_failures: int = 0
    failed_s: float = 0.0
    wait_s: float = 0.0


@dataclass(slots=True)
class BackOff:
    """Counts failures in a row for each worker id. Time comes in as an argument.

    The first replacement comes at once, the second after `first_s`, each further one after twice as
    long, up to `max_s`. A process that was READY for `stable_after_s` ends the row. While a pool is
    empty no wait is longer than `max_empty_s`: nobody can be served until a start succeeds.
    """

    first_s: float
    max_s: float
    stable_after_s: float
    max_empty_s: float = 2.0
    _rows: dict[str, _Row] = field(default_factory=dict)

    def failed(self, worker_id: str, ready_for_s: float, now: float) -> None:
        """Count a death that nobody asked for, of a process that had been READY for so long."""
        row = self._rows.setdefault(worker_id, _Row())
        row.num_failures = 1 if ready_for_s >= self.stable_after_s else row.num_failures + 1
        row.failed_s, row.wait_s = now, self._wait_s(row.num_failures)

    def forget(self, worker_id: str) -> None:
        """Start afresh: the process ended because it was told to."""
        self._rows.pop(worker_id, None)

    def num_failures(self, worker_id: str) -> int:
        row = self._rows.get(worker_id)
        return row.num_failures if row is not None else 0

    def may_start(self, worker_id: str, now: float, *, is_pool_empty: bool = False) -> bool:
        row = self._rows.get(worker_id)
        if row is None:
            return True
        wait_s = min(row.wait_s, self.max_empty_s) if is_pool_empty else row.wait_s
        return now >= row.failed_s + wait_s

    def seconds_left(self, worker_id: str, now: float) -> float:
        row = self._rows.get(worker_id)
        return max(0.0, row.failed_s + row.wait_s - now) if row is not None else 0.0

    def _wait_s(self, num_failures: int) -> float:
        if num_failures < 2:
            return 0.0
        doublings = min(num_failures - 2, 32)
        return float(min(self.max_s, self.first_s * 2**doublings))
