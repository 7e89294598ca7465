"""Carry news of imports from the io loop into the engine thread."""

from collections.abc import Sequence

from paceline.decode_worker.core import DecodeCore
from paceline.kv_transfer.lease import FirstToken
from paceline.request import AttemptKey, Span
from paceline.worker.mailbox import Mailbox


class Intake:
    """Implements `paceline.worker.kv_import.ImportListener`. Io loop only."""

    def __init__(self, core: DecodeCore, mailbox: Mailbox) -> None:
        self._core = core
        self._mailbox = mailbox

    def import_progressed(self, key: AttemptKey) -> None:
        self._mailbox.post(lambda now: self._core.import_progressed(key, now))

    def imported(self, key: AttemptKey, first_tokens: Sequence[FirstToken]) -> None:
        self._mailbox.post(lambda now: self._core.imported(key, first_tokens, now))

    def confirmed(self, key: AttemptKey, spans: list[Span], num_bytes: int) -> None:
        self._mailbox.post(lambda now: self._core.confirmed(key, spans, num_bytes, now))

    def lost(self, key: AttemptKey, reason: str) -> None:
        self._mailbox.post(lambda now: self._core.lost(key, reason, now))

    def import_ended(self, key: AttemptKey) -> None:
        self._mailbox.post(lambda now: self._core.import_ended(key, now))
