"""What shapes the tokens of each sequence, on the device by slot; a kernel fills it in.

    starts   record | record | ... | edits, prompt, output of the first | of the second | ...
             START                   EDIT[num_edits], int32[num_prompt], int32[num_output]

A sequence that takes a slot is a record, and what has no fixed length lies behind the records;
prompt and output are there only if the sequence has penalties. All of it is int32 words, so that it
travels within a step's upload. A program fills in one slot's table, or a tile of its counts.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TILE = 4096
"""Tokens of the vocabulary that a program clears and counts"""
_BLOCK = 1024


class SlotValues(NamedTuple):
    """What shapes the tokens of one sequence; names as in SamplingParams."""

    temperature: float
    """0 is greedy; else at least the smallest normal float32"""
    lowest: float
    """log min_p"""
    top_p: float
    seed: int
    top_k: int
    choice: int
    min_tokens: int
    num_biases: int
    """Edits that always count"""
    num_edits: int
    """Edits at output indices below min_tokens"""
    has_penalties: bool
    repetition: float
    presence: float
    frequency: float
    num_logprobs: int
    """At most V; -1: none are wanted"""


_FORMATS = ["f4", "f4", "f8", "u8", *["i4"] * 6, *["f4"] * 3, "i4"]
SLOT = np.dtype(list(zip(SlotValues._fields, _FORMATS, strict=True)))
"""A slot's row in SamplingSlots.words"""
START = np.dtype(
    [("slot", "i4"), ("first", "i4"), ("num_prompt", "i4"), ("num_output", "i4"), ("values", SLOT)]
)
"""A record; `first` is the word at which its edits begin. A slot of -1 starts nothing."""
EDIT = np.dtype([("token", "i4"), ("value", "f4")])
"""What is added to a logit; edits of one token add up in their order."""


def _column(name: str, of: np.dtype[np.void] = SLOT) -> tl.constexpr:
    fields = of.fields
    assert fields is not None
    return tl.constexpr(fields[name][1] // 4)


TEMPERATURE: tl.constexpr = _column("temperature")
LOWEST: tl.constexpr = _column("lowest")
TOP_P: tl.constexpr = _column("top_p")
SEED: tl.constexpr = _column("seed")
TOP_K: tl.constexpr = _column("top_k")
CHOICE: tl.constexpr = _column("choice")
MIN_TOKENS: tl.constexpr = _column("min_tokens")
NUM_BIASES: tl.constexpr = _column("num_biases")
NUM_EDITS: tl.constexpr = _column("num_edits")
HAS_PENALTIES: tl.constexpr = _column("has_penalties")
REPETITION: tl.constexpr = _column("repetition")
PRESENCE: tl.constexpr = _column("presence")
FREQUENCY: tl.constexpr = _column("frequency")
NUM_LOGPROBS: tl.constexpr = _column("num_logprobs")
WIDTH: tl.constexpr = tl.constexpr(SLOT.itemsize // 4)
_FIRST: tl.constexpr = _column("first", START)
_NUM_PROMPT: tl.constexpr = _column("num_prompt", START)
_NUM_OUTPUT: tl.constexpr = _column("num_output", START)
_VALUES: tl.constexpr = _column("values", START)
_RECORD: tl.constexpr = tl.constexpr(START.itemsize // 4)


class SamplingSlots(NamedTuple):
    """Tables by slot. Starts change them, and tokens sampled where there are penalties."""

    words: torch.Tensor
    """int32 [slots, 16], each a SLOT"""
    edits: torch.Tensor
    """int32 [slots, E, 2], each an EDIT: biases, then tokens that min_tokens bans"""
    seen: torch.Tensor
    """bool [slots, V], in prompt or output; only of slots with penalties, as counts"""
    counts: torch.Tensor
    """int32 [slots, V], in the output; 0 where not seen"""

    @classmethod
    def allocate(
        cls, num_slots: int, vocab_size: int, max_edits: int, device: torch.device | str
    ) -> "SamplingSlots":
        """Allocate slots that are greedy and change nothing, with room for E edits each."""
        words = np.zeros(num_slots, SLOT)
        words["top_p"], words["num_logprobs"] = 1.0, -1
        return cls(
            torch.from_numpy(words.view(np.int32).reshape(num_slots, -1)).to(device),
            torch.zeros((num_slots, max(max_edits, 1), 2), dtype=torch.int32, device=device),
            torch.zeros((num_slots, vocab_size), dtype=torch.bool, device=device),
            torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device),
        )


def check_rows(logits: torch.Tensor, **of_rows: torch.Tensor) -> None:
    """Raise ValueError for logits that are not [R, V], or arrays that are not int32 [R]."""
    if logits.dim() != 2 or logits.dtype not in _DTYPES or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [R, V] of one of {_DTYPES} with a row's elements beside each other, "
            f"got {logits.dtype} {list(logits.shape)} of strides {logits.stride()}"
        )
    num_rows = logits.shape[0]
    for name, tensor in of_rows.items():
        if tensor.dtype != torch.int32 or tensor.shape != (num_rows,) or tensor.stride(0) != 1:
            raise ValueError(
                f"{name} must be contiguous int32 [{num_rows}], got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )


def start_slots_triton(starts: torch.Tensor, num_starts: int, slots: SamplingSlots) -> None:
    """Give slots to sequences, in stream order: what was launched before keeps what it had.

    `starts` is int32 [words] on the slots' device, laid out as above; what it says is not checked.
    No slot is named twice.
    """
    if starts.dtype != torch.int32 or starts.dim() != 1 or not starts.is_contiguous():
        raise ValueError(
            f"starts must be contiguous int32 [words], got {starts.dtype} {list(starts.shape)}"
        )
    if len(starts) < num_starts * START.itemsize // 4:
        raise ValueError(f"{len(starts)} words cannot hold {num_starts} records of starts")
    if any(not tensor.is_contiguous() for tensor in slots):
        raise ValueError("the slots' tensors must be contiguous")
    if num_starts:
        vocab_size = slots.seen.shape[1]
        launch(_start_kernel, (num_starts, triton.cdiv(vocab_size, _TILE)))(
            starts, slots, slots.edits.stride(0), vocab_size, TILE=_TILE, BLOCK=_BLOCK
        )


@triton.jit
def slot_int(slots, slot, COLUMN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return an int32 of a slot, itself int64."""
    return tl.load(slots.words + slot * WIDTH + COLUMN)


@triton.jit
def slot_float(slots, slot, COLUMN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a float32 of a slot."""
    return slot_int(slots, slot, COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def slot_wide(slots, slot, COLUMN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the 64 bits of a slot's float64 or uint64, int64."""
    low = slot_int(slots, slot, COLUMN).to(tl.int64)
    high = slot_int(slots, slot, COLUMN + 1).to(tl.int64)
    return (high << 32) | (low & 0xFFFFFFFF)


@triton.jit
def _copy(source, target, num_words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(0, num_words, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < num_words
        tl.store(target + places, tl.load(source + places, mask=inside, other=0), mask=inside)


# Starts lie anywhere in a step's upload: where they begin must not choose another kernel.
@triton.jit(do_not_specialize_on_alignment=["starts"])
def _start_kernel(  # type: ignore[no-untyped-def]
    starts, slots, edit_stride, vocab_size, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    record = starts + tl.program_id(0) * _RECORD
    tile = tl.program_id(1)
    slot = tl.load(record).to(tl.int64)
    if slot < 0:
        return
    edits = starts + tl.load(record + _FIRST)
    num_edit_words = tl.load(record + _VALUES + NUM_EDITS) * 2
    if tile == 0:
        _copy(record + _VALUES, slots.words + slot * WIDTH, WIDTH, WIDTH)
        _copy(edits, slots.edits + slot * edit_stride, num_edit_words, BLOCK)
    if tl.load(record + _VALUES + HAS_PENALTIES) != 0:
        end = tl.minimum((tile + 1) * TILE, vocab_size)
        seen = slots.seen + slot * vocab_size
        counts = slots.counts + slot * vocab_size
        own = tile * TILE + tl.arange(0, TILE)
        tl.store(seen + own, tl.zeros((TILE,), tl.int1), mask=own < end)
        tl.store(counts + own, tl.zeros((TILE,), tl.int32), mask=own < end)
        # Another thread clears than counts.
        tl.debug_barrier()
        num_prompt = tl.load(record + _NUM_PROMPT)
        num_tokens = num_prompt + tl.load(record + _NUM_OUTPUT)
        for start in range(0, num_tokens, BLOCK):
            places = start + tl.arange(0, BLOCK)
            tokens = tl.load(
                edits + num_edit_words + places, mask=places < num_tokens, other=vocab_size
            )
            here = (tokens >= tile * TILE) & (tokens < end)
            tl.store(seen + tokens, tl.full((BLOCK,), 1, tl.int1), mask=here)
            tl.atomic_add(counts + tokens, 1, mask=here & (places >= num_prompt), sem="relaxed")
