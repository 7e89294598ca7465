"""What a step must read and compute, and the shortest time for it.

Counted is what no implementation avoids: each weight is read once a step, the KV of the context
once a sequence; activations may stay on the chip. The floor is the sum, over operations, of the
longer one of reading and computing.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from paceline.bench.gpu_rates import Rates
from paceline.engine.model_config import ModelConfig

ITEM_BYTES = 2
"""Of bf16"""


class Operation(NamedTuple):
    """One kind of operation of a step."""

    name: str
    num_calls: int
    """How often it comes in a step."""
    num_bytes: float
    flops: float


def step_operations(
    config: ModelConfig, chunks: Sequence[tuple[int, int]], num_samples: int
) -> list[Operation]:
    """List what a step does. chunks: (tokens before the step, new tokens) of each sequence."""
    num_rows = sum(num_new for _, num_new in chunks)
    width = config.num_heads * config.head_dim
    kv_width = 2 * config.num_kv_heads * config.head_dim
    products = (
        ("qkv", config.num_layers, num_rows, width + kv_width, config.hidden_size),
        ("o", config.num_layers, num_rows, config.hidden_size, width),
        ("gate_up", config.num_layers, num_rows, 2 * config.intermediate_size, config.hidden_size),
        ("down", config.num_layers, num_rows, config.hidden_size, config.intermediate_size),
        ("head", 1, num_samples, config.vocab_size, config.hidden_size),
    )
    found = [
        Operation(name, count, ITEM_BYTES * outputs * inner, 2.0 * rows * outputs * inner)
        for name, count, rows, outputs, inner in products
        if rows
    ]
    for window in sorted(set(config.windows), key=lambda window: window or 0):
        pairs = sum(_num_pairs(start, num_new, window) for start, num_new in chunks)
        read = sum(_num_read(start, num_new, window) for start, num_new in chunks)
        found.append(
            Operation(
                "attention" if window is None else f"attention of {window}",
                config.windows.count(window),
                ITEM_BYTES * kv_width * read,
                4.0 * width * pairs,
            )
        )
    norms = 2 * config.num_layers + 1
    found.append(Operation("norms", norms, ITEM_BYTES * config.hidden_size, 0.0))
    found.append(Operation("embedding", 1, ITEM_BYTES * config.hidden_size * num_rows, 0.0))
    return found


def _num_pairs(start: int, num_new: int, window: int | None) -> int:
    """Queries times the keys that they see."""
    num_seen = np.arange(start + 1, start + num_new + 1)
    return int(np.minimum(num_seen, num_seen[-1] if window is None else window).sum())


def _num_read(start: int, num_new: int, window: int | None) -> int:
    """Keys that a chunk reads, each once."""
    return num_new + (start if window is None else min(start, window - 1))


def floor_s(operations: Iterable[Operation], rates: Rates) -> float:
    """Return the shortest time of a step, each operation bound by reading or by computing."""
    return sum(op.num_calls * rates.floor_s(op.num_bytes, op.flops) for op in operations)


def num_bytes(operations: Iterable[Operation]) -> float:
    """Return what a step reads."""
    return sum(op.num_calls * op.num_bytes for op in operations)


def num_flops(operations: Iterable[Operation]) -> float:
    """Return what a step computes."""
    return sum(op.num_calls * op.flops for op in operations)
