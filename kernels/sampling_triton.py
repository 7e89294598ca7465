"""Choose tokens from logits on a GPU, as `sampling` and the engine's sampler do, without a sort.

    s      = logits, -inf where not allowed, + logit_bias, -inf while min_tokens bans, - penalties
    d      = (s - max s) / temperature                                   float32, at most 0
    floor  = max(log min_p, the k-th largest d); then the d of the last token needed to reach
             top_p of the weight of d >= floor
    token  = argmax s, or where temperature > 0: argmax of d + noise over d >= floor,

where the tokens under -HEAD_NATS, the tail, race as one first (see `sampling`). A token is that
of the reference: words of noise are the same bits, weights are whole numbers in units of 2**-34
and so exact in any order, and equal numbers go to the lowest id. exp and log are the GPU's own, so
tokens can differ where two candidates, or a share and top_p, lie within their rounding.

    prepare  (row, tile of the vocabulary)   s, and the best of each tile, of logits and of s
    scan     (row, tile)                     at random only: weights; the tile's part of the race.
                                             With top_k or top_p instead the head, as a list
    finish   (row)                           the token; top_k and top_p by bisection over the bits
                                             of d in the list, or over the row if that is too short

Greedy rows leave `scan` at once, and without a random row it is not launched. A row that changes
none of its logits is never copied. Nothing waits for the CPU: what is wrong with a row is in its
`status`, to be read with the token.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import gumbels
from paceline.kernels.sampling import HEAD_NATS, MAX_VOCAB_SIZE

STATUS_OK = 0
STATUS_NOT_FINITE = 1
"""The largest logit is infinite or not a number."""
STATUS_NONE_ALLOWED = 2

TILE = 1024
"""Tokens of a program of `prepare` and `scan`. Unmeasured so far, as all sizes here."""
MAX_CANDIDATES = 4096
"""Longest list of a row's head; longer ones are filtered over the whole row."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HEAD: tl.constexpr = tl.constexpr(HEAD_NATS)
_INT_COLUMNS = 8
_FLOAT_COLUMNS = 8
# Columns of SamplingSlots.ints.
_TOP_K: tl.constexpr = tl.constexpr(0)
_MIN_TOKENS: tl.constexpr = tl.constexpr(1)
_CHOICE: tl.constexpr = tl.constexpr(2)
_STATE_ROW: tl.constexpr = tl.constexpr(3)
_NUM_BIASES: tl.constexpr = tl.constexpr(4)
_NUM_EDITS: tl.constexpr = tl.constexpr(5)
# Columns of SamplingSlots.floats.
_TEMPERATURE: tl.constexpr = tl.constexpr(0)
_LOWEST: tl.constexpr = tl.constexpr(1)
_REPETITION: tl.constexpr = tl.constexpr(2)
_PRESENCE: tl.constexpr = tl.constexpr(3)
_FREQUENCY: tl.constexpr = tl.constexpr(4)


class SamplingSlots(NamedTuple):
    """What shapes the tokens of each slot, on the device; changes when a sequence starts."""

    ints: torch.Tensor
    """int32 [slots, 8]"""
    floats: torch.Tensor
    """float32 [slots, 8]"""
    top_p: torch.Tensor
    """float64 [slots]"""
    seeds: torch.Tensor
    """int64 [slots], the bits of unsigned ones"""
    edit_tokens: torch.Tensor
    """int32 [slots, E]: tokens with a bias, then those that min_tokens bans"""
    edit_values: torch.Tensor
    """float32 [slots, E]"""

    @classmethod
    def allocate(
        cls, num_slots: int, max_edits: int, device: torch.device | str
    ) -> "SamplingSlots":
        """Allocate slots that are greedy and change nothing, with room for E edits each."""
        slots = cls(
            torch.zeros((num_slots, _INT_COLUMNS), dtype=torch.int32, device=device),
            torch.zeros((num_slots, _FLOAT_COLUMNS), dtype=torch.float32, device=device),
            torch.ones(num_slots, dtype=torch.float64, device=device),
            torch.zeros(num_slots, dtype=torch.int64, device=device),
            torch.zeros((num_slots, max(max_edits, 1)), dtype=torch.int32, device=device),
            torch.zeros((num_slots, max(max_edits, 1)), dtype=torch.float32, device=device),
        )
        slots.ints[:, _STATE_ROW.value] = -1
        return slots

    def set(self, slot: int, shape: "SlotShape") -> None:
        """Give a slot to a sequence, in stream order: rows launched before keep what they had."""
        edits = [*shape.logit_bias, *((token, -math.inf) for token in shape.banned)]
        if len(edits) > self.edit_tokens.shape[1]:
            raise ValueError(
                f"{len(shape.logit_bias)} tokens with a bias and {len(shape.banned)} that "
                f"min_tokens bans are more than the {self.edit_tokens.shape[1]} that fit"
            )
        state_row = -1 if shape.state_row is None else shape.state_row
        ints = [shape.top_k, shape.min_tokens, shape.choice, state_row]
        ints += [len(shape.logit_bias), len(edits)]
        lowest = math.log(shape.min_p) if shape.min_p > 0.0 else -math.inf
        temperature = shape.temperature
        if temperature > 0.0:  # less divides to the same tokens
            temperature = max(temperature, torch.finfo(torch.float32).tiny)
        floats = [temperature, lowest, shape.repetition, shape.presence, shape.frequency]
        self.ints[slot, : len(ints)] = torch.tensor(ints, dtype=torch.int32)
        self.floats[slot, : len(floats)] = torch.tensor(floats, dtype=torch.float32)
        self.top_p[slot] = shape.top_p
        self.seeds[slot] = shape.seed - 2**64 if shape.seed >= 2**63 else shape.seed
        if edits:
            tokens, values = zip(*edits, strict=True)
            self.edit_tokens[slot, : len(edits)] = torch.tensor(tokens, dtype=torch.int32)
            self.edit_values[slot, : len(edits)] = torch.tensor(values, dtype=torch.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class SlotShape:
    """What shapes the tokens of one sequence; names as in SamplingParams."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    banned: tuple[int, ...] = ()
    """Tokens not sampled at output indices below min_tokens"""
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    state_row: int | None = None
    """Row of SeenState; a sequence with penalties needs one"""


class SeenState(NamedTuple):
    """Tokens that penalties look at: rows of those slots that have any."""

    seen: torch.Tensor
    """bool [P, V], in prompt or output"""
    counts: torch.Tensor
    """int32 [P, V], in the output; 0 where not seen"""


class SampledRows(NamedTuple):
    """What a launch writes, each [R]. Rows without a slot are left as they are."""

    token_ids: torch.Tensor
    """int32; -1 where status is not STATUS_OK"""
    status: torch.Tensor
    """int32"""
    largest: torch.Tensor
    """float32, the largest logit; infinite where one is not a number"""

    @classmethod
    def allocate(cls, num_rows: int, device: torch.device | str) -> "SampledRows":
        """Allocate for up to R rows."""
        return cls(
            torch.full((num_rows,), -1, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.int32, device=device),
            torch.zeros(num_rows, dtype=torch.float32, device=device),
        )


class SamplingWorkspace(NamedTuple):
    """Memory between the kernels of one stream; needs no filling."""

    scores: torch.Tensor
    """float32 [R, V]: s of the rows that change it; d of those filtered over the whole row"""
    tile_floats: torch.Tensor
    """float32 [2, R, T]: the largest logit and s"""
    tile_tokens: torch.Tensor
    """int32 [2, R, T]: the tokens of the largest s and of the race's best"""
    tile_races: torch.Tensor
    """float64 [R, T]"""
    tile_weights: torch.Tensor
    """int64 [2, R, T], of tokens kept by min_p, and of those among them in the tail"""
    list_lengths: torch.Tensor
    """int32 [R]; also counts what found no room"""
    list_values: torch.Tensor
    """float32 [R, C]"""
    list_tokens: torch.Tensor
    """int32 [R, C]"""

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        vocab_size: int,
        device: torch.device | str,
        tile: int = TILE,
        max_candidates: int = MAX_CANDIDATES,
    ) -> "SamplingWorkspace":
        """Allocate for up to R rows; 4 V + 8 C bytes each, and little else."""
        num_tiles = triton.cdiv(vocab_size, tile)

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            empty(torch.float32, num_rows, vocab_size),
            empty(torch.float32, 2, num_rows, num_tiles),
            empty(torch.int32, 2, num_rows, num_tiles),
            empty(torch.float64, num_rows, num_tiles),
            empty(torch.int64, 2, num_rows, num_tiles),
            empty(torch.int32, num_rows),
            empty(torch.float32, num_rows, max_candidates),
            empty(torch.int32, num_rows, max_candidates),
        )


def sample_triton(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    indices: torch.Tensor,
    slots: SamplingSlots,
    out: SampledRows,
    workspace: SamplingWorkspace,
    *,
    allowed_mask: torch.Tensor | None = None,
    state: SeenState | None = None,
    any_random: bool = True,
    tile: int = TILE,
) -> None:
    """Sample one token a row into `out`, and count it into `state` where its slot has a row there.

    `logits` is [R, V], rows of any stride, and not changed; `row_slots` and `indices` (output
    index) are int32 [R]; a row of slot -1 does nothing. `allowed_mask` is int32 [R, ceil(V / 32)]
    as for the sampler. `any_random=False` promises that every slot is greedy. A slot with
    penalties has one row. Sizes and the options are of the launch, all else is read on the device,
    so that a launch can be captured. `workspace` was allocated with `tile`.
    """
    num_rows, vocab_size = _check(logits, row_slots, indices, slots, out, allowed_mask)
    _check_workspace(workspace, num_rows, vocab_size, tile)
    if state is not None:
        for tensor, dtype in zip(state, (torch.bool, torch.int32), strict=True):
            if tensor.dtype != dtype or tensor.dim() != 2 or tensor.shape[1] != vocab_size:
                raise ValueError(
                    f"state must be bool and int32 [P, {vocab_size}], got {tensor.dtype} "
                    f"{list(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise ValueError("state must be contiguous")
    if num_rows == 0:
        return
    num_tiles = triton.cdiv(vocab_size, tile)
    row_arguments = (logits, logits.stride(0), row_slots, indices, slots.ints, slots.floats)
    seen, counts = (None, None) if state is None else state
    _prepare_kernel[(num_rows, num_tiles)](
        *row_arguments,
        slots.edit_tokens,
        slots.edit_values,
        slots.edit_tokens.shape[1],
        allowed_mask,
        0 if allowed_mask is None else allowed_mask.stride(0),
        seen,
        counts,
        *workspace[:3],
        workspace.tile_floats.shape[1],
        workspace.list_lengths,
        vocab_size,
        TILE=tile,
        # As PyTorch, which rounds each product.
        enable_fp_fusion=False,
    )
    shared = {
        "HAS_MASK": allowed_mask is not None,
        "NUM_TILES": num_tiles,
        "TILES_BLOCK": triton.next_power_of_2(num_tiles),
        "MAX_CANDIDATES": workspace.list_values.shape[1],
        "TILE": tile,
    }
    if any_random:
        _scan_kernel[(num_rows, num_tiles)](
            *row_arguments,
            slots.top_p,
            slots.seeds,
            *workspace,
            workspace.tile_floats.shape[1],
            vocab_size,
            **shared,
        )
    _finish_kernel[(num_rows,)](
        *row_arguments,
        slots.top_p,
        slots.seeds,
        *workspace,
        workspace.tile_floats.shape[1],
        *out,
        seen,
        counts,
        vocab_size,
        **shared,
        ANY_RANDOM=any_random,
        num_warps=8,
    )


def _check(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    indices: torch.Tensor,
    slots: SamplingSlots,
    out: SampledRows,
    allowed_mask: torch.Tensor | None,
) -> tuple[int, int]:
    if logits.dim() != 2 or logits.dtype not in _DTYPES or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [R, V] of one of {_DTYPES} with a row's elements beside each other, "
            f"got {logits.dtype} {list(logits.shape)} of strides {logits.stride()}"
        )
    num_rows, vocab_size = logits.shape
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"the vocabulary has {vocab_size} tokens, not 1 to {MAX_VOCAB_SIZE}")
    for name, tensor in {"row_slots": row_slots, "indices": indices}.items():
        if tensor.dtype != torch.int32 or tensor.shape != (num_rows,) or tensor.stride(0) != 1:
            raise ValueError(
                f"{name} must be contiguous int32 [{num_rows}], got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    if any(len(tensor) < num_rows or not tensor.is_contiguous() for tensor in out):
        raise ValueError(f"out has room for {len(out.token_ids)} rows, and {num_rows} are sampled")
    if any(not tensor.is_contiguous() for tensor in slots):
        raise ValueError("the slots' tensors must be contiguous")
    num_words = triton.cdiv(vocab_size, 32)
    if allowed_mask is not None and (
        allowed_mask.dtype != torch.int32
        or allowed_mask.shape != (num_rows, num_words)
        or allowed_mask.stride(1) != 1
    ):
        raise ValueError(
            f"allowed_mask must be int32 [{num_rows}, {num_words}], got {allowed_mask.dtype} "
            f"{list(allowed_mask.shape)}"
        )
    return num_rows, vocab_size


def _check_workspace(
    workspace: SamplingWorkspace, num_rows: int, vocab_size: int, tile: int
) -> None:
    room, width = workspace.scores.shape
    num_tiles = workspace.tile_races.shape[1]
    if room < num_rows or width != vocab_size or num_tiles != triton.cdiv(vocab_size, tile):
        raise ValueError(
            f"the workspace is for {room} rows of {width} tokens in {num_tiles} tiles, and "
            f"{num_rows} rows of {vocab_size} in tiles of {tile} are sampled"
        )


@triton.jit
def _changes_logits(ints, slot, HAS_MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    num_edits = tl.load(ints + slot * 8 + _NUM_EDITS)
    state_row = tl.load(ints + slot * 8 + _STATE_ROW)
    return (num_edits > 0) | (state_row >= 0) | HAS_MASK


@triton.jit
def _first_of(values, tokens):  # type: ignore[no-untyped-def]
    """Return the largest value and the lowest token that has it."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, tokens, 2147483647), axis=0)


@triton.jit
def _prepare_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    indices,
    ints,
    floats,
    edit_tokens,
    edit_values,
    max_edits,
    allowed_mask,
    mask_stride,
    seen,
    counts,
    scores,
    tile_floats,
    tile_tokens,
    max_rows,
    list_lengths,
    vocab_size,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    num_tiles = tl.num_programs(1)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    tokens = tile * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    values = tl.load(logits + row * logits_stride + tokens, mask=inside, other=float("-inf"))
    values = values.to(tl.float32)
    # Not a number counts as larger than all.
    largest = tl.max(tl.where(values == values, values, float("inf")), axis=0)
    place = row * num_tiles + tile
    tl.store(tile_floats + place, largest)
    if tile == 0:
        tl.store(list_lengths + row, 0)
    if _changes_logits(ints, slot, allowed_mask is not None):
        if allowed_mask is not None:
            words = tl.load(allowed_mask + row * mask_stride + tokens // 32, mask=inside, other=0)
            values = tl.where(((words >> (tokens % 32)) & 1) != 0, values, float("-inf"))
        num_edits = tl.load(ints + slot * 8 + _NUM_BIASES)
        if tl.load(indices + row) < tl.load(ints + slot * 8 + _MIN_TOKENS):
            num_edits = tl.load(ints + slot * 8 + _NUM_EDITS)
        for edit in range(num_edits):
            token = tl.load(edit_tokens + slot * max_edits + edit)
            value = tl.load(edit_values + slot * max_edits + edit)
            values = tl.where(tokens == token, values + value, values)
        if seen is not None:
            state_row = tl.load(ints + slot * 8 + _STATE_ROW).to(tl.int64)
            if state_row >= 0:
                repetition = tl.load(floats + slot * 8 + _REPETITION)
                presence = tl.load(floats + slot * 8 + _PRESENCE)
                frequency = tl.load(floats + slot * 8 + _FREQUENCY)
                places = state_row * vocab_size + tokens
                was_seen = tl.load(seen + places, mask=inside, other=0) != 0
                count = tl.load(counts + places, mask=inside, other=0)
                divided = tl.div_rn(values, tl.zeros_like(values) + repetition)
                penalised = tl.where(values > 0, divided, values * repetition)
                penalised -= frequency * count + presence * (count > 0).to(tl.float32)
                values = tl.where(was_seen, penalised, values)
        tl.store(scores + row * vocab_size + tokens, values, mask=inside)
    best, token = _first_of(values, tokens)
    tl.store(tile_floats + max_rows * num_tiles + place, best)
    tl.store(tile_tokens + place, token)


@triton.jit
def _distances(  # type: ignore[no-untyped-def]
    logits, logits_stride, scores, row, tokens, vocab_size, changed, best, temperature
):
    """Return d of some tokens, -inf outside the vocabulary."""
    inside = tokens < vocab_size
    if changed:
        values = tl.load(scores + row * vocab_size + tokens, mask=inside, other=float("-inf"))
    else:
        values = tl.load(logits + row * logits_stride + tokens, mask=inside, other=float("-inf"))
        values = values.to(tl.float32)
    values = values - best
    return tl.div_rn(values, tl.zeros_like(values) + temperature)


@triton.jit
def _weights(distances, kept):  # type: ignore[no-untyped-def]
    """Return exp(d) in whole units of 2**-34, int64; 0 where not kept."""
    weights = tl.floor(tl.exp(distances) * 17179869184.0).to(tl.int64)
    return tl.where(kept, weights, 0)


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    indices,
    ints,
    floats,
    top_p,
    seeds,
    scores,
    tile_floats,
    tile_tokens,
    tile_races,
    tile_weights,
    list_lengths,
    list_values,
    list_tokens,
    max_rows,
    vocab_size,
    HAS_MASK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    temperature = tl.load(floats + slot * 8 + _TEMPERATURE)
    if temperature == 0.0:
        return
    tiles = tl.arange(0, TILES_BLOCK)
    bests = tile_floats + (max_rows + row) * NUM_TILES + tiles
    best = tl.max(tl.load(bests, mask=tiles < NUM_TILES, other=float("-inf")), axis=0)
    tokens = tile * TILE + tl.arange(0, TILE)
    changed = _changes_logits(ints, slot, HAS_MASK)
    distances = _distances(
        logits, logits_stride, scores, row, tokens, vocab_size, changed, best, temperature
    )
    kept = (tokens < vocab_size) & (distances >= tl.load(floats + slot * 8 + _LOWEST))
    head = kept & (distances >= -_HEAD)
    weights = _weights(distances, kept)
    place = row * NUM_TILES + tile
    tl.store(tile_weights + place, tl.sum(weights, axis=0))
    tail_weight = tl.sum(tl.where(head, 0, weights), axis=0)
    tl.store(tile_weights + max_rows * NUM_TILES + place, tail_weight)
    num_heads = tl.sum(head.to(tl.int32), axis=0)
    top_k = tl.load(ints + slot * 8 + _TOP_K)
    if ((top_k > 0) & (top_k < vocab_size)) | (tl.load(top_p + slot) < 1.0):
        if num_heads > 0:
            # Tiles come in any order; what is made of the list depends on none.
            start = tl.atomic_add(list_lengths + row, num_heads)
            places = start + tl.cumsum(head.to(tl.int32), axis=0) - 1
            fits = head & (places < MAX_CANDIDATES)
            places = row * MAX_CANDIDATES + places
            tl.store(list_values + places, distances, mask=fits)
            tl.store(list_tokens + places, tokens, mask=fits)
    else:
        noisy = tl.full((TILE,), float("-inf"), tl.float64)
        if num_heads > 0:
            noise = gumbels(
                tokens.to(tl.uint32),
                tl.load(seeds + slot),
                tl.load(ints + slot * 8 + _CHOICE),
                tl.load(indices + row),
            )
            noisy = tl.where(head, distances.to(tl.float64) + noise, noisy)
        raced, token = _first_of(noisy, tokens)
        tl.store(tile_races + place, raced)
        tl.store(tile_tokens + max_rows * NUM_TILES + place, token)


@triton.jit
def _spread(  # type: ignore[no-untyped-def]
    logits, logits_stride, scores, row, vocab_size, changed, best, temperature, TILE: tl.constexpr
):
    """Write d of the whole row over its scores."""
    for start in range(0, vocab_size, TILE):
        tokens = start + tl.arange(0, TILE)
        distances = _distances(
            logits, logits_stride, scores, row, tokens, vocab_size, changed, best, temperature
        )
        tl.store(scores + row * vocab_size + tokens, distances, mask=tokens < vocab_size)
    tl.debug_barrier()


@triton.jit
def _weight_between(  # type: ignore[no-untyped-def]
    values, length, lowest, end, TILE: tl.constexpr
):
    """Return the weight of lowest <= d < end, int64."""
    total = tl.zeros((TILE,), tl.int64)
    for start in range(0, length, TILE):
        places = start + tl.arange(0, TILE)
        distances = tl.load(values + places, mask=places < length, other=float("-inf"))
        kept = (places < length) & (distances >= lowest) & (distances < end)
        total += _weights(distances, kept)
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(  # type: ignore[no-untyped-def]
    values, length, lowest, needed, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr
):
    """Return the largest of `values` so that those from it on, over `lowest`, reach `needed`.

    What is needed is a weight or a number of values. The bits of -d are those of a number that
    grows with it: each step decides one, from the highest on.
    """
    bits = tl.full((), 0, tl.int32)
    for step in range(31):
        bit = 1 << (30 - step)
        reached = tl.zeros((TILE,), tl.int64)
        for start in range(0, length, TILE):
            places = start + tl.arange(0, TILE)
            distances = tl.load(values + places, mask=places < length, other=float("-inf"))
            depth = tl.abs(distances).to(tl.int32, bitcast=True)
            counted = (places < length) & (distances >= lowest) & (depth < (bits | bit))
            if BY_WEIGHT:
                reached += _weights(distances, counted)
            else:
                reached += counted.to(tl.int64)
        if tl.sum(reached, axis=0).to(tl.float64) < needed:
            bits = bits | bit
    return -(bits.to(tl.float32, bitcast=True))


@triton.jit
def _race(  # type: ignore[no-untyped-def]
    values,
    token_ids,
    length,
    lowest,
    end,
    seed,
    choice,
    index,
    IS_LIST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Return the best d + noise of lowest <= d < end, and the lowest token that has it."""
    best = tl.full((), float("-inf"), tl.float64)
    winner = tl.full((), 2147483647, tl.int32)
    for start in range(0, length, TILE):
        places = start + tl.arange(0, TILE)
        distances = tl.load(values + places, mask=places < length, other=float("-inf"))
        racing = (places < length) & (distances >= lowest) & (distances < end)
        if tl.sum(racing.to(tl.int32), axis=0) > 0:
            if IS_LIST:
                tokens = tl.load(token_ids + places, mask=racing, other=2147483647)
            else:
                tokens = places
            noise = gumbels(tokens.to(tl.uint32), seed, choice, index)
            noisy = tl.where(racing, distances.to(tl.float64) + noise, float("-inf"))
            raced, token = _first_of(noisy, tokens)
            if (raced > best) | ((raced == best) & (token < winner)):
                best = raced
                winner = token
    return best, winner


@triton.jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    indices,
    ints,
    floats,
    top_p,
    seeds,
    scores,
    tile_floats,
    tile_tokens,
    tile_races,
    tile_weights,
    list_lengths,
    list_values,
    list_tokens,
    max_rows,
    token_ids,
    status,
    largest_logits,
    seen,
    counts,
    vocab_size,
    HAS_MASK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
    ANY_RANDOM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    tiles = tl.arange(0, TILES_BLOCK)
    exists = tiles < NUM_TILES
    place = row * NUM_TILES + tiles
    second = max_rows * NUM_TILES + place
    largest = tl.max(tl.load(tile_floats + place, mask=exists, other=float("-inf")), axis=0)
    tile_best = tl.load(tile_floats + second, mask=exists, other=float("-inf"))
    tile_token = tl.load(tile_tokens + place, mask=exists, other=2147483647)
    best, token = _first_of(tile_best, tile_token)
    tl.store(largest_logits + row, largest)
    if tl.abs(largest) == float("inf"):
        tl.store(status + row, 1)
        tl.store(token_ids + row, -1)
        return
    if best == float("-inf"):
        tl.store(status + row, 2)
        tl.store(token_ids + row, -1)
        return
    if ANY_RANDOM:
        temperature = tl.load(floats + slot * 8 + _TEMPERATURE)
        if temperature > 0.0:
            changed = _changes_logits(ints, slot, HAS_MASK)
            seed = tl.load(seeds + slot)
            choice = tl.load(ints + slot * 8 + _CHOICE)
            index = tl.load(indices + row)
            floor = tl.load(floats + slot * 8 + _LOWEST)
            share = tl.load(top_p + slot)
            top_k = tl.load(ints + slot * 8 + _TOP_K)
            is_limited = (top_k > 0) & (top_k < vocab_size)
            kept_weights = tl.load(tile_weights + place, mask=exists, other=0)
            tail_weights = tl.load(tile_weights + second, mask=exists, other=0)
            tail_weight = tl.sum(tail_weights, axis=0)
            # Over the whole row: d of all its tokens lies in its scores.
            is_spread = False
            winner = token
            raced = tl.full((), float("-inf"), tl.float64)
            if is_limited | (share < 1.0):
                length = tl.load(list_lengths + row)
                # The list has all that min_p keeps, or all of the head.
                too_short = is_limited & (length < top_k) & (floor < -_HEAD)
                is_spread = (length > MAX_CANDIDATES) | too_short
                values = list_values + row * MAX_CANDIDATES
                if is_spread:
                    _spread(
                        logits,
                        logits_stride,
                        scores,
                        row,
                        vocab_size,
                        changed,
                        best,
                        temperature,
                        MAX_CANDIDATES,
                    )
                    values = scores + row * vocab_size
                    length = vocab_size
                infinite = float("inf")
                total = tl.sum(kept_weights, axis=0)
                if is_limited:
                    if length >= top_k:
                        last = _bisect(
                            values, length, floor, top_k.to(tl.float64), False, MAX_CANDIDATES
                        )
                        floor = tl.maximum(floor, last)
                    total = _weight_between(values, length, floor, infinite, MAX_CANDIDATES)
                if share < 1.0:
                    target = share * total.to(tl.float64)
                    if not is_spread:
                        reached = _weight_between(values, length, floor, infinite, MAX_CANDIDATES)
                        if reached.to(tl.float64) < target:
                            _spread(
                                logits,
                                logits_stride,
                                scores,
                                row,
                                vocab_size,
                                changed,
                                best,
                                temperature,
                                MAX_CANDIDATES,
                            )
                            is_spread = True
                            values = scores + row * vocab_size
                            length = vocab_size
                    floor = _bisect(values, length, floor, target, True, MAX_CANDIDATES)
                lowest = tl.maximum(floor, -_HEAD)
                if is_spread:
                    raced, winner = _race(
                        values,
                        list_tokens,
                        length,
                        lowest,
                        infinite,
                        seed,
                        choice,
                        index,
                        False,
                        MAX_CANDIDATES,
                    )
                    tail_weight = _weight_between(values, length, floor, -_HEAD, MAX_CANDIDATES)
                else:
                    raced, winner = _race(
                        values,
                        list_tokens + row * MAX_CANDIDATES,
                        length,
                        lowest,
                        infinite,
                        seed,
                        choice,
                        index,
                        True,
                        MAX_CANDIDATES,
                    )
            else:
                tile_race = tl.load(tile_races + place, mask=exists, other=float("-inf"))
                race_token = tl.load(tile_tokens + second, mask=exists, other=2147483647)
                raced, winner = _first_of(tile_race, race_token)
            if (floor < -_HEAD) & (tail_weight > 0):
                tail_draw = tl.full((16,), 4294967295, tl.uint32)
                tail_noise = tl.max(gumbels(tail_draw, seed, choice, index), axis=0)
                # 34 log 2
                tail_score = tl.log(tail_weight.to(tl.float64)) - 23.56700413903814 + tail_noise
                if tail_score > raced:
                    if not is_spread:
                        _spread(
                            logits,
                            logits_stride,
                            scores,
                            row,
                            vocab_size,
                            changed,
                            best,
                            temperature,
                            MAX_CANDIDATES,
                        )
                    raced, winner = _race(
                        scores + row * vocab_size,
                        list_tokens,
                        vocab_size,
                        floor,
                        -_HEAD,
                        seed,
                        choice,
                        index,
                        False,
                        MAX_CANDIDATES,
                    )
            token = winner
    tl.store(status + row, 0)
    tl.store(token_ids + row, token)
    if seen is not None:
        state_row = tl.load(ints + slot * 8 + _STATE_ROW).to(tl.int64)
        if state_row >= 0:
            counter = counts + state_row * vocab_size + token
            tl.store(counter, tl.load(counter) + 1)
            tl.store(seen + state_row * vocab_size + token, True)
