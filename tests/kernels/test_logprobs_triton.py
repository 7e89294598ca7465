"""Log-probabilities are those of a softmax in float64, the best ones in order."""

import pytest
import torch
from triton_device import device, poisoned

from paceline.kernels.logprobs_triton import LogprobsWorkspace, TokenLogprobs, logprobs_triton

TILE = 64


def run(logits: torch.Tensor, chosen: torch.Tensor, num_best: int, wanted: list[bool]) -> tuple:
    num_rows, vocab_size = logits.shape
    out = TokenLogprobs(
        poisoned((num_rows,), torch.float32),
        poisoned((num_rows, num_best), torch.float32),
        torch.full((num_rows, num_best), -7, dtype=torch.int32, device=device()),
    )
    workspace = LogprobsWorkspace.allocate(num_rows, vocab_size, num_best, device(), TILE)
    logprobs_triton(
        logits.to(device()),
        chosen.to(device(), torch.int32),
        torch.tensor(wanted, device=device()),
        out,
        workspace,
        TILE,
    )
    return tuple(tensor.cpu() for tensor in out)


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
    own, values, token_ids = run(logits, chosen, num_best, [True] * 3)
    table = logits.double().log_softmax(-1)
    torch.testing.assert_close(own.double(), table[torch.arange(3), chosen], **TOLERANCE)
    # A stable sort keeps the lowest id of equals first.
    expected = table.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(token_ids.long(), expected.indices[:, :num_best])
    torch.testing.assert_close(values.double(), expected.values[:, :num_best], **TOLERANCE)


def test_banned_tokens_come_last_each_once() -> None:
    logits = torch.full((1, 200), -torch.inf)
    logits[0, [3, 150]] = torch.tensor([1.0, 2.0])
    _, values, token_ids = run(logits, torch.tensor([3]), 5, [True])
    assert token_ids.tolist() == [[150, 3, 0, 1, 2]]
    assert values[0, 2:].tolist() == [-torch.inf] * 3


def test_rows_not_wanted_are_left_alone() -> None:
    logits = make_logits(70, torch.float32)
    logits[1] = torch.nan
    own, values, token_ids = run(logits, torch.tensor([5, 5, 5]), 2, [True, False, True])
    assert own.isnan().tolist() == [False, True, False]
    assert values.isnan().all(dim=1).tolist() == [False, True, False]
    assert (token_ids == -7).all(dim=1).tolist() == [False, True, False]


def test_a_token_left_out_of_the_sum_is_noticed() -> None:
    logits = make_logits(301, torch.float32)
    chosen = torch.tensor([0, 0, 0])
    own, _, _ = run(logits[:, :300].contiguous(), chosen, 1, [True] * 3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(own.double(), logits.double().log_softmax(-1)[:, 0], **TOLERANCE)


def test_what_the_kernel_cannot_do_is_refused() -> None:
    logits = make_logits(70, torch.float32)
    chosen = torch.zeros(3)
    with pytest.raises(ValueError, match="71 tokens each"):
        run(logits, chosen, 71, [True] * 3)
    with pytest.raises(ValueError, match="wanted must be"):
        run(logits, chosen, 1, [True] * 2)
    with pytest.raises(ValueError, match="logits must be"):
        run(logits.double(), chosen, 1, [True] * 3)
