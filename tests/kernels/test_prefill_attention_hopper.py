"""The kernel's producer and consumers, run as threads, attend as plain causal attention does.

What only a GPU shows is in the tests that are marked so.
"""

import collections
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

import gluon_stand_in
import numpy as np
import pytest
import torch
from paged_context import LAYER, Paged, make_paged, plain_attention
from triton_device import device, poisoned

pytest.importorskip("triton.experimental.gluon", reason="this Triton has no Gluon")

if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the GPU is not a Hopper", allow_module_level=True)

from gluon_stand_in import Descriptor, Pointer, StandIn

from paceline.kernels import prefill_attention_hopper as hopper
from paceline.kernels import prefill_attention_hopper_kernel as hopper_kernel
from paceline.kernels.prefill_attention_triton import prefill_attention_triton
from paceline.kernels.prefill_tiles import PrefillTiles, TileTable, make_tile_table

SCALE = 0.2
# Weights and outputs are each rounded to bfloat16's 2**-8.
TOLERANCE = 2**-6


def make_tiles(block_n: int = 32, heads_per_tile: int = 1, num_stages: int = 2) -> PrefillTiles:
    return PrefillTiles(128, block_n, heads_per_tile, 1, 4, num_stages, specialized=True)


class Launcher:
    """Takes the place of the kernel; its grid is ignored, as programs are the stand-in's."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def __getitem__(self, _grid: object) -> Any:
        return self

    def __call__(self, *arguments: Any, num_warps: int, **sizes: Any) -> None:
        assert num_warps == 4
        taken: list[Any] = []
        for argument in arguments:
            if isinstance(argument, hopper.TensorDescriptor):
                taken.append(Descriptor(argument))
            elif isinstance(argument, torch.Tensor):
                taken.append(Pointer(argument))
            else:
                taken.append(argument)
        self._stand_in.run("prefill_attention_hopper_kernel", *taken, **sizes)


def use_few_programs(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> StandIn:
    """Launch programs that take several tiles each; by the stand-in where there is no GPU."""
    monkeypatch.setattr(hopper, "_num_sms", lambda _: 3)
    stand_in = StandIn(hopper_kernel, 3, seed)
    if device() == "cpu":
        monkeypatch.setattr(hopper, "prefill_attention_hopper_kernel", Launcher(stand_in))
    return stand_in


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_programs(monkeypatch)


def attend(
    paged: Paged,
    q: torch.Tensor,
    starts: list[int],
    counts: list[int],
    tiles: PrefillTiles,
    *,
    window: int | None = None,
    num_tiles: int | None = None,
    layer: int = LAYER,
) -> torch.Tensor:
    lengths = np.array(starts) + np.array(counts)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    table = make_tile_table(
        np.array(starts, np.int32), np.array(counts, np.int32), tiles, num_tiles
    )
    out = poisoned(tuple(q.shape), q.dtype)
    return prefill_attention_triton(
        q,
        paged.kv,
        layer,
        torch.from_numpy(paged.tables).to(device()),
        torch.from_numpy(lengths.astype(np.int32)).to(device()),
        torch.from_numpy(offsets.astype(np.int32)).to(device()),
        TileTable(tiles, table.entries.to(device())),
        SCALE,
        window=window,
        out=out,
    )


def make_context(
    starts: list[int],
    counts: list[int],
    *,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Paged, torch.Tensor]:
    """Return sequences in a pool whose unused places are NaN, and queries."""
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    paged = make_paged(
        lengths, kv_heads=kv_heads, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype
    )
    kv = paged.kv.masked_fill(paged.kv == paged.kv.max(), torch.nan).to(device())
    q = torch.randn(sum(counts), heads, head_dim).to(device(), dtype)
    return paged._replace(kv=kv), q


def expected(
    paged: Paged, q: torch.Tensor, counts: list[int], window: int | None = None
) -> torch.Tensor:
    rows = zip(q.cpu().split(counts), paged.keys, paged.values, strict=True)
    return torch.cat([plain_attention(*row, window, SCALE) for row in rows])


def assert_near(output: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(output.cpu().float(), wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 1, 20, 150])
@pytest.mark.usefixtures("few_programs")
def test_ragged_rows_equal_plain_attention(window: int | None) -> None:
    """Without and with a cached prefix, across block and tile borders, shorter than a tile."""
    starts, counts = [37, 0, 84, 300, 31], [135, 3, 200, 16, 1]
    paged, q = make_context(starts, counts)
    output = attend(paged, q, starts, counts, make_tiles(), window=window)
    assert_near(output, expected(paged, q, counts, window))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "dtype", "tiles"),
    [
        (4, 2, 128, 16, torch.float16, make_tiles(64)),
        (4, 1, 64, 16, torch.bfloat16, make_tiles(128, heads_per_tile=4)),
        (3, 3, 64, 64, torch.bfloat16, make_tiles(32, num_stages=3)),
        (8, 2, 128, 8, torch.bfloat16, make_tiles(32, heads_per_tile=2, num_stages=4)),
    ],
)
@pytest.mark.usefixtures("few_programs")
def test_every_shape_in_any_tiles(
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_tokens: int,
    dtype: torch.dtype,
    tiles: PrefillTiles,
) -> None:
    starts, counts = [50, 0], [141, 29]
    paged, q = make_context(
        starts,
        counts,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
    )
    output = attend(paged, q, starts, counts, tiles, window=90)
    assert_near(output, expected(paged, q, counts, 90))


@pytest.mark.usefixtures("few_programs")
def test_spare_entries_do_nothing() -> None:
    starts, counts = [20, 7], [158, 6]
    paged, q = make_context(starts, counts)
    output = attend(paged, q, starts, counts, make_tiles(), num_tiles=11)
    assert_near(output, expected(paged, q, counts))


@pytest.mark.usefixtures("few_programs")
def test_blocks_behind_the_window_are_not_read() -> None:
    """Their entries may be stale: here they name a block of NaN, within a step that is read."""
    starts, counts = [70], [10]
    paged, q = make_context(starts, counts)
    num_hidden = (70 - 22 + 1) // 16
    assert num_hidden * 16 % 32
    (unused,) = set(range(len(paged.kv))) - set(paged.tables.flat)
    wanted = expected(paged, q, counts, 22)
    paged.tables[0, :num_hidden] = unused
    assert_near(attend(paged, q, starts, counts, make_tiles(), window=22), wanted)


@pytest.mark.parametrize(("block_n", "num_stages"), [(128, 2), (64, 4), (64, 3), (32, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_parts_wait_for_each_other_whatever_their_pace(
    block_n: int, num_stages: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many new tokens as cached ones, and a row that ends within a block."""
    use_few_programs(monkeypatch, seed)
    starts, counts = [512, 70], [512, 119]
    paged, q = make_context(starts, counts)
    output = attend(paged, q, starts, counts, make_tiles(block_n, num_stages=num_stages))
    assert_near(output, expected(paged, q, counts))


@pytest.mark.skipif(device() != "cpu", reason="a GPU is not stopped")
def test_buffers_that_only_one_half_gives_back_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = use_few_programs(monkeypatch)
    monkeypatch.setattr(gluon_stand_in, "DEADLINE_S", 1.0)

    def arrive(barrier: gluon_stand_in.Barrier) -> None:
        if threading.current_thread().name == "part 0":
            barrier.change(2, 0)

    stand_in.names["mbarrier"].arrive = arrive
    paged, q = make_context([512], [300])
    with pytest.raises((AssertionError, TimeoutError)):
        attend(paged, q, [512], [300], make_tiles(64))


@pytest.mark.skipif(device() != "cpu", reason="a GPU may be right without")
@pytest.mark.parametrize("missing", ["queries", "values"])
def test_missing_fences_are_noticed(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of each part is that of its queries, the second that of the row's last block."""
    stand_in = use_few_programs(monkeypatch)
    fence = stand_in.names["fence_async_shared"]
    counts: collections.Counter[int] = collections.Counter()

    def fence_others() -> None:
        counts[threading.get_ident()] += 1
        if threading.current_thread().name.startswith("part") and (
            counts[threading.get_ident()] != {"queries": 1, "values": 2}[missing]
        ):
            fence()

    stand_in.names["fence_async_shared"] = fence_others
    paged, q = make_context([0], [100])
    with pytest.raises(AssertionError, match="a store was not fenced"):
        attend(paged, q, [0], [100], make_tiles(128))


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 4, 5), (3, 1, 0, 2, 4, 5)])
@pytest.mark.usefixtures("few_programs")
def test_pools_in_any_order_of_their_dimensions(order: tuple[int, ...]) -> None:
    starts, counts = [20], [130]
    paged, q = make_context(starts, counts, kv_heads=2)
    kv = paged.kv.permute(order).contiguous().permute(*np.argsort(order).tolist())
    output = attend(paged._replace(kv=kv), q, starts, counts, make_tiles())
    assert_near(output, expected(paged, q, counts))


@pytest.mark.usefixtures("few_programs")
def test_layers_and_pools_in_turn() -> None:
    """What is kept of a pool is of no layer, and of no other pool."""
    starts, counts = [20], [130]
    contexts = [make_context(starts, counts, block_tokens=size) for size in (16, 32, 16)]
    for paged, _ in contexts:
        paged.kv[:, 0] = -paged.kv[:, LAYER]
    for layer, sign in ((LAYER, 1), (0, -1), (LAYER, 1)):
        for paged, q in contexts:
            output = attend(paged, q, starts, counts, make_tiles(), layer=layer)
            keys, values = [sign * k for k in paged.keys], [sign * v for v in paged.values]
            assert_near(output, expected(paged._replace(keys=keys, values=values), q, counts))


@pytest.mark.usefixtures("few_programs")
def test_a_pool_is_looked_at_once() -> None:
    paged, q = make_context([0], [40])
    before = hopper._pool_rows.cache_info()
    for _ in range(3):
        attend(paged, q, [0], [40], make_tiles())
    after = hopper._pool_rows.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


@pytest.mark.usefixtures("few_programs")
def test_a_pool_that_its_owner_drops_is_freed() -> None:
    paged, q = make_context([0], [40])
    attend(paged, q, [0], [40], make_tiles())
    pool, memory = weakref.ref(paged.kv), weakref.ref(paged.kv.untyped_storage())
    del paged
    assert pool() is None
    assert memory() is None


def test_pools_one_after_another_are_told_apart() -> None:
    """Each, once freed, may leave the next its address, and its place among Python's objects."""
    for order in [(0, 1), (1, 0)] * 8:
        kv = torch.empty(2, 2, 2, 2, 16, 64, dtype=torch.bfloat16).permute(*order, 2, 3, 4, 5)
        rows = hopper._pool_rows(weakref.ref(kv), kv.data_ptr(), 128)
        assert (rows.block, rows.layer) == ((128, 64) if order == (0, 1) else (64, 128))
        del kv


@pytest.mark.usefixtures("few_programs")
def test_a_table_of_spare_entries_alone_needs_no_row() -> None:
    """There is not even a length to read."""
    paged, q = make_context([0], [40])
    none = paged._replace(tables=paged.tables[:0])
    output = attend(none, q, [], [], make_tiles(), num_tiles=3)
    torch.testing.assert_close(output, poisoned(tuple(q.shape), q.dtype), equal_nan=True)


@pytest.mark.usefixtures("few_programs")
def test_a_swapped_block_is_noticed() -> None:
    """The tolerance tells a wrong block from a right one."""
    starts, counts = [20], [130]
    paged, q = make_context(starts, counts)
    wanted = expected(paged, q, counts)
    paged.tables[0, [1, 2]] = paged.tables[0, [2, 1]]
    with pytest.raises(AssertionError):
        assert_near(attend(paged, q, starts, counts, make_tiles()), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float32}, "the pool is of torch.float32"),
        ({"head_dim": 96}, "heads have 96"),
        ({"block_tokens": 4}, "blocks have 4 tokens"),
        ({"block_tokens": 24}, "blocks have 24 tokens"),
    ],
)
def test_what_cannot_be_done_is_refused(options: Any, message: str) -> None:
    paged, q = make_context([0], [9], **options)
    with pytest.raises(ValueError, match=message):
        attend(paged, q, [0], [9], make_tiles())


def test_pools_of_other_strides_are_refused() -> None:
    paged, q = make_context([0], [9])
    wide = torch.empty((*paged.kv.shape[:4], 17, 64), dtype=q.dtype).as_strided(
        paged.kv.shape, (*[s + 8 for s in paged.kv.stride()[:4]], 64, 1)
    )
    with pytest.raises(ValueError, match="no multiples of a token's"):
        attend(paged._replace(kv=wide), q, [0], [9], make_tiles())


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from paceline.kernels.prefill_attention_hopper import prefill_attention_hopper_kernel as kernel

sizes = dict(
    HEADS=1, NUM_HEAD_TILES=32, SHARERS=4, HEAD_DIM=128, BLOCK_TOKENS=16, WINDOW=0, ROWS=64,
    BLOCK_N=128, STAGES=2,
)
types = {name: "i32" for name in kernel.arg_names} | {name: "constexpr" for name in sizes}
types |= dict.fromkeys(("tables", "lengths", "offsets", "entries"), "*i32")
types |= {"q": "*bf16", "out": "*bf16", "score_scale": "fp32"}
types["pool"] = f"tensordesc<bf16[16, 128],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
source = GluonASTSource(kernel, types, constants)
compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
print(compiled.metadata.shared)
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_hopper_and_fits_its_shared_memory() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 227 * 1024
