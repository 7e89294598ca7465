"""Log-probabilities are those of a softmax in float64, the best ones in order."""

from collections.abc import Sequence

import pytest
import torch
from triton_device import device, poisoned

from paceline.engine.gpu.slot_words import encode_starts
from paceline.engine.step_plan import EMPTY, SlotStart
from paceline.kernels.logprobs_triton import LogprobsWorkspace, TokenLogprobs, logprobs_triton
from paceline.kernels.sampling_slots_triton import SamplingSlots, start_slots_triton
from paceline.sampling_params import SamplingParams

TILE = 64


def make_slots(wanted: Sequence[int | None], vocab_size: int) -> SamplingSlots:
    slots = SamplingSlots.allocate(len(wanted), vocab_size, 1, device())
    starts = [
        SlotStart(slot, SamplingParams(temperature=0.0, logprobs=count), 0, EMPTY, EMPTY)
        for slot, count in enumerate(wanted)
    ]
    words = torch.from_numpy(encode_starts(starts, vocab_size, (), 1))
    start_slots_triton(words.to(device()), len(wanted), slots)
    return slots


def run(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    wanted: Sequence[int | None],
    row_slots: Sequence[int] = (0, 1, 2),
    max_best: int = 64,
) -> TokenLogprobs:
    num_rows, vocab_size = logits.shape
    out = TokenLogprobs(
        torch.full((num_rows,), -7, dtype=torch.int32, device=device()),
        poisoned((num_rows,), torch.float32),
        poisoned((num_rows, max_best), torch.float32),
        torch.full((num_rows, max_best), -7, dtype=torch.int32, device=device()),
    )
    logprobs_triton(
        logits.to(device()),
        chosen.to(device(), torch.int32),
        torch.tensor(row_slots[:num_rows], dtype=torch.int32, device=device()),
        make_slots(wanted, vocab_size),
        out,
        LogprobsWorkspace.allocate(num_rows, vocab_size, max_best, device(), TILE),
        TILE,
    )
    return TokenLogprobs(*(tensor.cpu() for tensor in out))


def make_logits(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(3, vocab_size, generator=generator) * 4).to(dtype)


# Logits convert to float32 exactly, so what is left is its rounding: of values near 20.
TOLERANCE = {"rtol": 1e-6, "atol": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "num_best"), [(1, 1), (5, 0), (64, 64), (301, 20)])
def test_equals_the_softmax(vocab_size: int, num_best: int, dtype: torch.dtype) -> None:
    logits = make_logits(vocab_size, dtype)
    chosen = torch.tensor([0, vocab_size // 2, vocab_size - 1])
    counts, own, values, token_ids = run(logits, chosen, [num_best] * 3)
    assert counts.tolist() == [num_best] * 3
    assert bool((token_ids[:, num_best:] == -7).all())
    table = logits.double().log_softmax(-1)
    torch.testing.assert_close(own.double(), table[torch.arange(3), chosen], **TOLERANCE)
    # A stable sort keeps the lowest id of equals first.
    expected = table.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(token_ids[:, :num_best].long(), expected.indices[:, :num_best])
    values = values[:, :num_best].double()
    torch.testing.assert_close(values, expected.values[:, :num_best], **TOLERANCE)


def test_banned_tokens_come_last_each_once() -> None:
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [3, 150]] = torch.tensor([1.0, 2.0])
    _, _, values, token_ids = run(logits, torch.tensor([3]), [5], max_best=5)
    assert token_ids.tolist() == [[150, 3, 0, 1, 2]]
    assert values[0, 2:].tolist() == [-torch.inf] * 3


def test_each_row_has_as_many_as_its_slot_wants_and_others_are_left_alone() -> None:
    logits = make_logits(70, torch.float32)[[0, 1, 2, 0]]
    logits[1:3] = torch.nan
    chosen = torch.tensor([5, 5, 5, 5])
    counts, own, values, token_ids = run(logits, chosen, [2, None, 30], [0, 1, -1, 2])
    assert counts.tolist() == [2, -1, -1, 30]
    assert own.isnan().tolist() == [False, True, True, False]
    assert (~values.isnan()).sum(dim=1).tolist() == [2, 0, 0, 30]
    assert (token_ids >= 0).sum(dim=1).tolist() == [2, 0, 0, 30]
    assert torch.equal(token_ids[0, :2], token_ids[3, :2])


def test_a_token_left_out_of_the_sum_is_noticed() -> None:
    logits = make_logits(301, torch.float32)
    chosen = torch.tensor([0, 0, 0])
    _, own, _, _ = run(logits[:, :300].contiguous(), chosen, [1] * 3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(own.double(), logits.double().log_softmax(-1)[:, 0], **TOLERANCE)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    logits = make_logits(70, torch.float32)
    chosen = torch.zeros(3)
    with pytest.raises(ValueError, match="for 0 tokens each"):
        run(logits, chosen, [1] * 3, max_best=0)
    with pytest.raises(ValueError, match="row_slots must be"):
        run(logits, chosen, [1] * 3, [0, 1])
    with pytest.raises(ValueError, match="logits must be"):
        run(logits.double(), chosen, [1] * 3)
