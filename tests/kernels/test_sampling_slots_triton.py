"""A start fills in its slot's tables, and nothing of the others."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from triton_device import device

from paceline.kernels.sampling_slots_triton import (
    EDIT,
    SLOT,
    START,
    SamplingSlots,
    SlotValues,
    start_slots_triton,
)

GREEDY = SlotValues(0.0, -np.inf, 1.0, 0, 0, 0, 0, 0, 0, False, 1.0, 0.0, 0.0, -1)
SHAPED = SlotValues(0.7, -2.5, 0.9, 2**64 - 3, 40, 7, 11, 1, 2, True, 1.5, 0.25, -0.75, 20)


def poisoned_slots(vocab_size: int, max_edits: int) -> SamplingSlots:
    slots = SamplingSlots.allocate(5, vocab_size, max_edits, device())
    for tensor in (slots.words, slots.edits, slots.counts):
        tensor.fill_(-7)
    slots.seen.fill_(True)
    return slots


def random_ids(rng: np.random.Generator, length: int, vocab_size: int) -> npt.NDArray[np.int32]:
    # Few different ones, of all tiles, with the first and the last.
    some = [0, *rng.integers(0, vocab_size, 40), vocab_size - 1]
    return rng.choice(some, length).astype(np.int32)


@pytest.mark.parametrize("vocab_size", [50, 4096, 9000])
@pytest.mark.parametrize(
    ("num_edits", "num_prompt", "num_output"), [(0, 1, 0), (3, 0, 1), (1500, 2500, 1500)]
)
def test_tables_are_those_that_the_words_say(
    vocab_size: int, num_edits: int, num_prompt: int, num_output: int
) -> None:
    rng = np.random.default_rng(num_prompt)
    slots = poisoned_slots(vocab_size, 1500)
    words, edits, seen, counts = (tensor.cpu().numpy().copy() for tensor in slots)
    records = np.zeros(3, START)
    parts = [records.view(np.int32)]
    for number, (slot, given) in enumerate([(3, SHAPED), (-1, SHAPED), (0, GREEDY)]):
        values = given._replace(num_edits=num_edits)
        added = np.zeros(num_edits, EDIT)
        added["token"], added["value"] = np.arange(num_edits), rng.normal(size=num_edits)
        prompt, output = (random_ids(rng, size, vocab_size) for size in (num_prompt, num_output))
        first = sum(map(len, parts))
        records[number] = (slot, first, num_prompt, num_output, tuple(values))
        parts.append(added.view(np.int32))
        if values.has_penalties:
            parts += [prompt, output]
        if slot >= 0:
            words[slot] = np.array([tuple(values)], SLOT).view(np.int32)
            edits[slot, :num_edits] = added.view(np.int32).reshape(-1, 2)
        if slot >= 0 and values.has_penalties:
            seen[slot] = np.isin(np.arange(vocab_size), np.concatenate([prompt, output]))
            counts[slot] = np.bincount(output, minlength=vocab_size)
    # Anywhere in an upload, whose other words are tokens of a sequence with another number.
    upload = np.concatenate([[5], *parts, np.full(9, vocab_size - 2)]).astype(np.int32)
    starts = torch.from_numpy(upload).to(device())[1:]
    start_slots_triton(starts, 3, slots)
    for name, expected in zip(slots._fields, (words, edits, seen, counts), strict=True):
        assert np.array_equal(getattr(slots, name).cpu().numpy(), expected), name


def test_the_first_words_alone_start_something() -> None:
    slots = poisoned_slots(100, 1)
    before = [tensor.clone() for tensor in slots]
    start_slots_triton(torch.zeros(0, dtype=torch.int32, device=device()), 0, slots)
    assert all(map(torch.equal, before, slots))
    # Zeros are a greedy sequence of slot 0.
    start_slots_triton(torch.zeros(60, dtype=torch.int32, device=device()), 1, slots)
    assert slots.words[0].tolist() == [0] * 16
    assert torch.equal(slots.words[1:], before[0][1:])


def test_what_the_kernel_cannot_do_is_refused() -> None:
    slots = poisoned_slots(100, 1)
    with pytest.raises(ValueError, match="39 words cannot hold 2 records"):
        start_slots_triton(torch.zeros(39, dtype=torch.int32, device=device()), 2, slots)
    with pytest.raises(ValueError, match="starts must be"):
        start_slots_triton(torch.zeros(20, device=device()), 1, slots)
    wide = slots._replace(seen=slots.seen[:, ::2])
    with pytest.raises(ValueError, match="must be contiguous"):
        start_slots_triton(torch.zeros(20, dtype=torch.int32, device=device()), 1, wide)
