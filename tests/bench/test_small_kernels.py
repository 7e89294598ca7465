"""Every case of the small kernels runs, ours and PyTorch's, and both do the same where they can."""

import torch
from triton_device import device

from paceline.bench.small_kernels import Shape, norm_case, silu_case, small_kernel_cases

TINY = Shape(64, 96, 4, 2, 16, 4, 200, rotated_bytes=1 << 10)


def test_every_case_runs() -> None:
    names = []
    for name, make in small_kernel_cases(TINY, (1, 5), (1, 3), device()):
        case = make()
        case.ours[0]()
        if case.theirs:
            case.theirs[0]()
        assert case.num_bytes > 0
        names.append(name)
    assert len(names) == len(set(names)) == 2 * 3 + 2 * 3 + 2 * 2


def test_both_sides_compute_the_same() -> None:
    for make in (silu_case, norm_case):
        case = make(TINY, 3, device())
        ours, theirs = case.ours[0](), case.theirs[0]()
        assert isinstance(ours, torch.Tensor)
        assert isinstance(theirs, torch.Tensor)
        if make is silu_case:  # the other one adds to its residual with each call
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
        assert ours.shape == theirs.shape
