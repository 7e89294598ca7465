"""Tell the router when a prompt was computed."""

from collections.abc import Iterable

from paceline.engine.chunking import ChunkTime
from paceline.request import Span


def prefill_spans(
    worker_id: str, chunk_times: Iterable[ChunkTime], unix_offset_s: float
) -> list[Span]:
    """Turn chunks into spans; `unix_offset_s` is Unix time minus the time of their clock."""
    return [
        Span(
            "prefill",
            worker_id,
            chunk.planned_s + unix_offset_s,
            chunk.applied_s + unix_offset_s,
            chunk.num_tokens,
        )
        for chunk in chunk_times
    ]
