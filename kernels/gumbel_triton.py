"""Gumbel noise of tokens, computed in a kernel from the counter-based stream of a sample.

    key     = seed (low word, high word)
    counter = (draw // 4, index, choice, 0)
    word    = philox4x32-10(key, counter)[draw % 4]       Salmon et al., SC 2011
    noise   = -log(-log((word + 1/2) / 2**32))            float64

The words are bit for bit those of the engine's random streams: any worker can continue a request.
"""

import math

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch

TAIL_DRAW = 2**32 - 1
"""As in `sampling`: the number of the tail's own noise. A token's number is its id."""


@triton.jit
def random_words(draws, seed, choice, index):  # type: ignore[no-untyped-def]
    """Return words, uint32 as draws: uint32 [B]; seed is int64, choice and index are int32."""
    zero = index * 0
    first, second, third, fourth = tl.philox(seed, draws >> 2, index, choice, zero)
    lane = draws & 3
    low = tl.where(lane == 0, first, second)
    high = tl.where(lane == 2, third, fourth)
    return tl.where(lane < 2, low, high)


@triton.jit
def gumbels(draws, seed, choice, index):  # type: ignore[no-untyped-def]
    """Return standard Gumbel noise, float64 as draws."""
    words = random_words(draws, seed, choice, index)
    return -tl.log(-tl.log((words.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)))


@triton.jit
def consecutive_words(first, seed, choice, index, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the words of the draws from `first` on, uint32 [NUM]; both are multiples of 4.

    One counter gives four words, so this is a quarter of the work of `random_words`.
    """
    return words_by_fours(first // 4 + tl.arange(0, NUM // 4), seed, choice, index, NUM)


@triton.jit
def words_by_fours(fours, seed, choice, index, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the words of the draws 4 f to 4 f + 3 of each f of `fours` [NUM / 4], in order."""
    words = tl.philox(seed, fours.to(tl.uint32), index, choice, index * 0)
    even = tl.join(words[0], words[2])
    odd = tl.join(words[1], words[3])
    return tl.reshape(tl.join(even, odd), (NUM,))


_INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
_LOG_2: tl.constexpr = tl.constexpr(math.log(2.0))
ROUGH_ERROR: tl.constexpr = tl.constexpr(2.0**-12)
"""At most so far is `rough_gumbels` from `gumbels`: 200 times the worst seen."""


@triton.jit
def _rough_log(values):  # type: ignore[no-untyped-def]
    """Return the logarithms of normal numbers: on a GPU one instruction, not 20 as tl.log is."""
    if _INTERPRETED:
        return tl.log(values)
    return _LOG_2 * tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [values], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rough_gumbels(words):  # type: ignore[no-untyped-def]
    """Return about the noise that `gumbels` makes of the words, float32, at a tenth of its cost.

    With u = (word + 1/2) / 2**32 and v = 1 - u it is -log(-log(u)), where -log(u) is that of v as
    a series when u is too near 1 for float32.
    """
    u = (words.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    v = ((words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    series = v * (1.0 + v * (1.0 / 2 + v * (1.0 / 3 + v * (1.0 / 4 + v * (1.0 / 5)))))
    return -_rough_log(tl.where(v < 1.0 / 16, series, -_rough_log(u)))


@triton.jit
def _words_kernel(  # type: ignore[no-untyped-def]
    draws, words, noise, seeds, choices, indices, num_draws, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    places = tl.arange(0, BLOCK)
    mask = places < num_draws
    drawn = tl.load(draws + places, mask=mask, other=0).to(tl.uint32)
    seed = tl.load(seeds + row)
    choice = tl.load(choices + row)
    index = tl.load(indices + row)
    out = row * num_draws + places
    own = random_words(drawn, seed, choice, index)
    tl.store(words + out, own.to(tl.int64), mask=mask)
    tl.store(noise + out, gumbels(drawn, seed, choice, index), mask=mask)


def random_words_triton(
    draws: torch.Tensor, seeds: torch.Tensor, choices: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the words, int64 [R, D], and the noise, float64 [R, D], of D draws in R streams.

    To compare them with the engine's: samplers call the functions above. `draws` is int64 [D];
    `seeds` int64 [R], of the bits of unsigned ones; `choices` and `indices` are int32 [R].
    """
    num_rows, num_draws = len(seeds), len(draws)
    expected = {"draws": torch.int64, "seeds": torch.int64}
    for name, tensor in {
        "draws": draws,
        "seeds": seeds,
        "choices": choices,
        "indices": indices,
    }.items():
        dtype, size = expected.get(name, torch.int32), num_draws if name == "draws" else num_rows
        if tensor.dtype != dtype or tensor.shape != (size,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} [{size}], got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    words = torch.empty((num_rows, num_draws), dtype=torch.int64, device=draws.device)
    noise = torch.empty((num_rows, num_draws), dtype=torch.float64, device=draws.device)
    block = triton.next_power_of_2(max(num_draws, 16))
    launch(_words_kernel, (num_rows,))(
        draws, words, noise, seeds, choices, indices, num_draws, BLOCK=block
    )
    return words, noise
