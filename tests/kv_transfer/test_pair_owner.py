"""What the owner's end bounds, over a reader of the test's."""

from typing import Any

import pytest
import torch
from kv_peer import wait_until

from paceline.errors import TransportError
from paceline.kv_layout import attention_layout
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.pair_messages import Ask, encode
from paceline.kv_transfer.pair_owner import PairOwner
from paceline.kv_transfer.transport import LocalPool


class SilentReader:
    """Asks, and never comes to the rendezvous."""

    def send(self, payload: bytes) -> None:
        pass

    def connect(self, store: ChannelStore, rank: int, timeout_s: float) -> Any:
        wait_until(lambda: store.is_closed)
        raise TransportError("nobody came")

    def close(self) -> None:
        pass


def test_a_reader_that_asks_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.kv_transfer.pair_owner.MAX_ASKS", 4)
    layout = attention_layout(
        num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32"
    )
    blocks = torch.zeros((8, layout.block_bytes), dtype=torch.uint8)
    reader = SilentReader()
    pool = LocalPool("owner-0", 1, layout, 8, blocks)
    owner = PairOwner("reader-0.1", pool, reader, lambda lease, ids: True, reader, 5.0)

    def ask_many() -> None:
        for seq in range(1, 10):
            owner.on_message(encode(Ask(seq, 1, layout.block_bytes, False, (1,))))

    with pytest.raises(TransportError, match="more than 4 reads waiting"):
        ask_many()
    owner.close()
    assert owner.end.join(2.0)


def test_a_peer_cannot_fill_a_rendezvous_with_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.kv_transfer.channel_store.MAX_KEYS", 4)
    store = ChannelStore(lambda key, value: None)
    for number in range(4):
        store.receive(f"key {number}", b"")
    store.receive("key 0", b"again")
    with pytest.raises(TransportError, match="more than 4 keys"):
        store.receive("key 4", b"")
