"""The Triton decode attention equals plain attention of each row by itself."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from decode_cut import aligned_tiles, even_tiles, one_row_tiles
from paged_context import LAYER, Paged, make_paged, plain_attention
from triton_device import device, poisoned

from paceline.kernels import decode_attention_triton as decode_attention_module
from paceline.kernels.decode_attention import decode_attention, plan_spans
from paceline.kernels.decode_attention_triton import decode_attention_triton
from paceline.kernels.decode_shares_triton import share_rows_triton
from paceline.kernels.decode_tiles import DecodeTiles, DecodeWorkspace, workspace_size

SCALE = 0.2
TOLERANCE = {
    torch.float32: 2e-5,  # sums in another order
    torch.float16: 4e-3,  # the weights and the output are rounded to 11 bits
    torch.bfloat16: 3e-2,  # the same, to 8 bits; the interpreter cuts bits off instead
}


class Case:
    """Sequences in a pool whose unwritten slots are NaN, and queries of their last tokens."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 64,
        block_tokens: int = 16,
        tokens: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.paged: Paged = make_paged(
            lengths, kv_heads=kv_heads, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype
        )
        filling = self.paged.kv > 5000
        self.kv = self.paged.kv.masked_fill(filling, float("nan")).to(device())
        self.tables = torch.from_numpy(self.paged.tables).to(device())
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device())
        self.q = torch.randn(len(lengths), tokens, heads, head_dim).to(dtype).to(device())

    def workspace(self, tiles: DecodeTiles, spare: int = 0) -> DecodeWorkspace:
        """Poisoned, with so many elements of each kind to spare."""
        _, tokens, heads, head_dim = self.q.shape
        num_kv_heads = self.kv.shape[2]
        num_partials, num_counters = workspace_size(
            len(self.lengths),
            num_kv_heads=num_kv_heads,
            num_queries=tokens * heads // num_kv_heads,
            head_dim=head_dim,
            tiles=tiles,
        )
        workspace = DecodeWorkspace.allocate(num_partials + spare, num_counters + spare, device())
        workspace.partials.fill_(float("nan"))
        return workspace

    def run(self, **changes: object) -> torch.Tensor:
        arguments = {
            "q": self.q,
            "kv": self.kv,
            "layer": LAYER,
            "tables": self.tables,
            "lengths": self.lengths,
            "scale": SCALE,
            "out": poisoned(tuple(self.q.shape), self.q.dtype),
        }
        return decode_attention_triton(**(arguments | changes))  # type: ignore[arg-type]

    def check(self, output: torch.Tensor, window: int | None = None) -> None:
        """Compare the rows that are not padding."""
        assert output.dtype is self.q.dtype
        output = output.view(self.q.shape).cpu().float()
        tolerance = TOLERANCE[self.q.dtype]
        for row, (k, v) in enumerate(zip(self.paged.keys, self.paged.values, strict=True)):
            if len(k):
                q = self.q[row].cpu()[-len(k) :]
                expected = plain_attention(q, k, v, window, SCALE)
                torch.testing.assert_close(
                    output[row, -len(k) :], expected, rtol=tolerance, atol=tolerance
                )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "tokens", "dtype", "num_shares"),
    [
        (9, 3, 64, 16, 1, torch.float32, 1),
        (2, 2, 64, 32, 3, torch.float32, 4),
        (7, 1, 96, 16, 1, torch.float32, 2),
        (4, 2, 128, 64, 2, torch.float32, 1),
        (5, 1, 256, 16, 4, torch.float32, 2),
        (3, 3, 24, 32, 2, torch.float32, 1),
        (32, 2, 128, 16, 1, torch.bfloat16, 2),
        (4, 1, 96, 32, 5, torch.bfloat16, 1),
        (2, 1, 256, 64, 1, torch.bfloat16, 1),
        (16, 1, 64, 16, 5, torch.float16, 4),  # 80 queries: two tiles of them
        (4, 1, 128, 32, 1, torch.float16, 2),
    ],
)
def test_equals_plain_attention(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    tokens: int,
    dtype: torch.dtype,
    num_shares: int,
) -> None:
    case = Case(
        [100, 0, 5, 33],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        tokens=tokens,
        dtype=dtype,
    )
    block_m = 64 if heads // kv_heads * tokens > 32 else 32
    case.check(case.run(tiles=even_tiles(block_m, 32, num_shares)))


@pytest.mark.parametrize(
    ("window", "num_shares"), [(1, 4), (2, 1), (20, 1), (20, 4), (64, 8), (1000, 2)]
)
def test_window_hides_what_lies_before_it(window: int, num_shares: int) -> None:
    case = Case([120, 16, 65], heads=2, kv_heads=1, tokens=3)
    case.check(case.run(window=window, tiles=even_tiles(16, 16, num_shares)), window)


@pytest.mark.parametrize(
    ("num_shares", "block_n"), [(1, 64), (2, 64), (3, 32), (5, 16), (8, 16), (13, 16), (32, 32)]
)
@pytest.mark.parametrize("make_tiles", [even_tiles, aligned_tiles, one_row_tiles])
def test_any_number_of_shares_gives_the_same(
    num_shares: int, block_n: int, make_tiles: Callable[[int, int, int], DecodeTiles]
) -> None:
    """Also more than there are tiles, rows within one share, and rows that end with a share."""
    case = Case([150, 1, 17, 0, 96], heads=2, kv_heads=1, tokens=2)
    tiles = make_tiles(16, block_n, num_shares)
    workspace = case.workspace(tiles, spare=5)
    first = case.run(tiles=tiles, workspace=workspace)
    case.check(first)
    again = case.run(tiles=tiles, workspace=workspace)
    torch.testing.assert_close(again, first, rtol=0, atol=0, equal_nan=True)
    assert workspace.partials[-5:].isnan().all()
    assert not workspace.counters.any()


def test_equals_the_reference_with_tiles_chosen_from_the_shape() -> None:
    case = Case([100, 31, 7], heads=6, tokens=1)
    spans = plan_spans(case.paged.tables, np.array([100, 31, 7], np.int32), case.paged.kv)
    expected = decode_attention(case.q[:, 0].cpu(), case.paged.kv, LAYER, spans, SCALE)
    output = case.run(out=None)[:, 0].cpu()
    torch.testing.assert_close(output, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("num_shares", [1, 4])
def test_rows_of_length_zero_are_neither_read_nor_written(num_shares: int) -> None:
    case = Case([40, 0, 0], tokens=2)
    case.tables[1:] = 2**30  # any use of these would leave the pool
    tiles = even_tiles(16, 16, num_shares)
    workspace = case.workspace(tiles)
    output = case.run(tiles=tiles, workspace=workspace)
    case.check(output)
    assert output[1:].isnan().all()


def test_a_row_within_one_share_needs_no_workspace() -> None:
    """A share begins with the first row and ends within the second."""
    case = Case([16, 80], tokens=2)
    tiles = even_tiles(16, 16, 2)  # 3 tiles each
    workspace = case.workspace(tiles)
    case.check(case.run(tiles=tiles, workspace=workspace))
    kept = workspace.partials[: 2 * 2 * 2 * 4 * 64].view(2, 2, 2, 4, 64)  # head, share, part
    assert kept[:, 0, 0].isnan().all()
    assert not kept[:, 0, 1].isnan().any()
    assert not kept[:, 1, 0].isnan().any()
    assert kept[:, 1, 1].isnan().all()


def test_many_parts_of_many_queries_are_merged_in_steps() -> None:
    case = Case([500, 30], heads=16, kv_heads=1, head_dim=128, tokens=2)
    tiles = even_tiles(32, 16, 32)
    workspace = case.workspace(tiles)
    case.check(case.run(tiles=tiles, workspace=workspace))
    assert not workspace.counters.any()


def test_queries_before_the_start_of_a_sequence_give_zero() -> None:
    case = Case([2, 40], tokens=4)
    for num_shares in (1, 4):
        output = case.run(tiles=even_tiles(16, 16, num_shares))
        assert (output[0, :2] == 0).all()
        case.check(output)


def test_strides_of_pool_queries_and_tables_are_followed() -> None:
    case = Case([70, 33], tokens=2)
    layer_major = case.kv.permute(1, 0, 3, 4, 2, 5).contiguous().permute(1, 0, 4, 2, 3, 5)
    assert layer_major.shape == case.kv.shape
    # Rows one after another, query heads first in a row of queries, keys and values.
    wide = torch.full((4, 10, 64), float("nan"), device=device())
    wide[:, :4] = case.q.view(4, 4, 64)
    tables = torch.full((2, 9), 2**30, dtype=torch.int32, device=device())
    tables[:, : case.tables.shape[1]] = case.tables
    out = poisoned((4, 6, 64), torch.float32)
    for tiles in (even_tiles(16, 16, 1), even_tiles(16, 16, 4)):
        result = case.run(
            q=wide[:, :4], kv=layer_major, tables=tables, out=out[:, 1:5], tiles=tiles
        )
        case.check(result)
        assert out[:, [0, 5]].isnan().all()


def test_blocks_beyond_two_to_the_31_elements_are_found() -> None:
    case = Case([40], heads=1, kv_heads=1, dtype=torch.float16)
    shape, used = case.kv.shape, case.tables[0]
    # A stride that fits into 32 bits, a product that does not. The memory between is not touched.
    stride = 2**30
    memory = torch.empty(2 * stride + shape[1:].numel(), dtype=torch.float16, device=device())
    sparse = memory.as_strided((3, *shape[1:]), (stride, *case.kv.stride()[1:]))
    sparse[2] = case.kv[used[0]]
    case.lengths[0] = 16
    case.paged.keys[0], case.paged.values[0] = case.paged.keys[0][:16], case.paged.values[0][:16]
    tables = torch.full((1, 1), 2, dtype=torch.int32, device=device())
    case.check(case.run(kv=sparse, tables=tables))


def test_lengths_and_tables_are_read_at_the_launch_not_at_the_plan() -> None:
    case = Case([130, 20])
    tiles = even_tiles(16, 16, 8)
    workspace = case.workspace(tiles)
    case.run(tiles=tiles, workspace=workspace)
    case.lengths.copy_(torch.tensor([50, 20]))
    case.tables[0, 4:] = 2**30
    case.paged.keys[0], case.paged.values[0] = case.paged.keys[0][:50], case.paged.values[0][:50]
    case.check(case.run(tiles=tiles, workspace=workspace))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_captured_launch_follows_lengths_and_tables() -> None:
    case = Case([130, 20, 300], tokens=2, dtype=torch.bfloat16)
    lengths, tables = torch.zeros_like(case.lengths), torch.zeros_like(case.tables)
    out = poisoned(tuple(case.q.shape), case.q.dtype)
    tiles = even_tiles(16, 32, 8)
    workspace = case.workspace(tiles)
    arguments = {
        "lengths": lengths,
        "tables": tables,
        "out": out,
        "workspace": workspace,
        "tiles": tiles,
    }
    case.run(**arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(**arguments)
    graph.replay()
    assert out.isnan().all()
    lengths.copy_(case.lengths)
    tables.copy_(case.tables)
    graph.replay()
    case.check(out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="programmatic launch needs CUDA")
def test_early_launch_changes_nothing() -> None:
    case = Case([130, 20, 300], tokens=2, dtype=torch.bfloat16)
    tiles = even_tiles(16, 32, 8)
    shares = share_rows_triton(case.lengths, tiles, num_tokens=2, max_length=400)
    for _ in range(20):
        case.check(case.run(shares=shares, tiles=tiles, launch_early=True))


@pytest.mark.parametrize("has_shares", [False, True])
def test_a_launch_right_behind_its_shares_is_not_early(
    has_shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads them before it waits for the kernel ahead."""
    case, tiles = Case([40, 20]), even_tiles(16, 16, 4)
    shares = share_rows_triton(case.lengths, tiles, max_length=48) if has_shares else None
    launched: list[bool] = []
    monkeypatch.setattr(
        decode_attention_module,
        "launch",
        lambda *_: lambda *_, **options: launched.append(options["LAUNCH_EARLY"]),
    )
    case.run(shares=shares, tiles=tiles, launch_early=True)
    assert launched == [has_shares]


@pytest.mark.parametrize(
    "mistake", ["swapped block", "one token less", "order of blocks", "later", "counter not zero"]
)
def test_a_mistake_is_noticed(mistake: str) -> None:
    case = Case([100, 100], heads=2, kv_heads=1, tokens=3)
    if mistake == "swapped block":
        case.tables[0, 2] = case.tables[1, 2]
    elif mistake == "one token less":
        case.lengths[0] -= 1
    elif mistake == "order of blocks":
        case.tables[0, [5, 6]] = case.tables[0, [6, 5]]
    elif (
        mistake == "later"
    ):  # the queries moved by one among each other: each sees one token too many or too few
        case.q = case.q.roll(1, dims=1)
    tiles = even_tiles(16, 32, 3)
    workspace = case.workspace(tiles)
    if mistake == "counter not zero":
        workspace.counters.fill_(2)  # no part finds that it is the last
    output = case.run(tiles=tiles, workspace=workspace)
    if mistake == "later":
        output, case.q = output.roll(-1, dims=1), case.q.roll(-1, dims=1)
    with pytest.raises(AssertionError):
        case.check(output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 4, 64, dtype=torch.float64)}, "float64"),
        ({"q": torch.zeros(2, 1, 4, 32)}, "32"),
        ({"q": torch.zeros(3, 1, 4, 64)}, "number of rows"),
        ({"q": torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16)}, "bfloat16"),
        ({"q": torch.zeros(2, 1, 3, 64)}, "3 query heads cannot share 2"),
        ({"q": torch.zeros(2, 1, 64, 4).transpose(2, 3)}, "strides"),
        ({"layer": 2}, "no layer 2"),
        ({"tables": torch.zeros(2, 3, dtype=torch.int64)}, "int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "number of rows"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"out": torch.zeros(2, 4, 64)}, "out must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    case = Case([20, 20])
    moved = {
        name: value.to(device()) if isinstance(value, torch.Tensor) else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=message):
        case.run(**moved)


def test_a_workspace_that_does_not_fit_is_refused() -> None:
    case = Case([20, 20])
    tiles = even_tiles(16, 16, 4)
    partials, counters = case.workspace(tiles)
    for wrong, message in (
        (DecodeWorkspace(partials[1:], counters), "partials must be .* or longer"),
        (DecodeWorkspace(partials, counters[1:]), r"counters must be .* \[4\] or longer"),
        (DecodeWorkspace(partials, counters.long()), "counters must be .* got torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            case.run(tiles=tiles, workspace=wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs shares in order")
def test_whichever_share_ends_last_the_bits_are_the_same() -> None:
    case = Case([700, 20, 300, 0, 90], heads=8, kv_heads=2, dtype=torch.bfloat16)
    tiles = even_tiles(16, 16, 32)
    workspace = case.workspace(tiles)
    first = case.run(tiles=tiles, workspace=workspace)
    case.check(first)
    for _ in range(200):
        again = case.run(tiles=tiles, workspace=workspace)
        assert torch.equal(again[case.lengths > 0], first[case.lengths > 0])
        assert not workspace.counters.any()
