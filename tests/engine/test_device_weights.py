"""Copying weights to a device: every row once, the bits of the CPU's path, an end on failure.

Without a GPU the same code copies to the CPU.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from model_references import write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from paceline.engine import device_weights
from paceline.engine.device_weights import (
    NUM_READERS,
    PIECE_BYTES,
    PartSize,
    Piece,
    allocate_weights,
    copy_to_device,
    plan_pieces,
)
from paceline.engine.model_config import read_model_config
from paceline.engine.parallel import ParallelContext
from paceline.engine.weights import dummy_weights, load_weights, open_parts
from paceline.errors import CapacityError, ConfigError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SMALL_PIECES = 1000
"""Bytes, so that tiny models have a few hundred pieces."""


def ignore(done: int, total: int) -> None:
    pass


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.cpu().view(torch.uint8), second.cpu().view(torch.uint8))
    )


def convert_files(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)


def merge_files(folder: Path) -> None:
    """Rewrite a folder's weights in the engine's layout."""
    config, path = read_model_config(folder), folder / "model.safetensors"
    dtype = next(iter(load_file(path).values())).dtype
    tensors = load_weights(folder, config, dtype, ParallelContext(), ignore)
    save_file(tensors, folder / "merged.safetensors")
    (folder / "merged.safetensors").replace(path)


def numbered_parts(*num_rows: int, width: int = 8) -> dict[str, list[torch.Tensor]]:
    """Build a weight whose numbers all differ, in parts of so many rows."""
    whole = torch.arange(sum(num_rows) * width, dtype=torch.int32).view(-1, width)
    return {"weight": list(whole.split(list(num_rows)))}


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "weights-reader" in thread.name]


@pytest.mark.parametrize("piece_bytes", [1, 64, 100, 1000, 1 << 20])
def test_plan_covers_every_row_once_within_the_size_of_a_piece(piece_bytes: int) -> None:
    sizes = {
        "a": [PartSize(7, 64), PartSize(3, 64)],
        "b": [PartSize(1, 5000)],
        "c": [PartSize(50, 2)],
    }
    pieces = list(plan_pieces(sizes, piece_bytes))
    in_parts: Counter[tuple[str, int, int]] = Counter()
    in_weights: Counter[tuple[str, int]] = Counter()
    for piece in pieces:
        row_bytes = sizes[piece.weight][piece.part].row_bytes
        assert piece.num_rows * row_bytes <= max(piece_bytes, row_bytes)
        for row in range(piece.num_rows):
            in_parts[piece.weight, piece.part, piece.part_row + row] += 1
            in_weights[piece.weight, piece.weight_row + row] += 1
    assert in_parts == Counter(
        (name, part, row)
        for name, parts in sizes.items()
        for part, size in enumerate(parts)
        for row in range(size.num_rows)
    )
    assert in_weights == Counter(
        (name, row)
        for name, parts in sizes.items()
        for row in range(sum(size.num_rows for size in parts))
    )


def test_plan_puts_parts_one_below_the_other() -> None:
    sizes = {"qkv": [PartSize(4, 10), PartSize(2, 10), PartSize(2, 10)]}
    assert list(plan_pieces(sizes, 30)) == [
        Piece("qkv", 0, 0, 0, 3),
        Piece("qkv", 0, 3, 3, 1),
        Piece("qkv", 1, 0, 4, 2),
        Piece("qkv", 2, 0, 6, 2),
    ]


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copied_weights_are_those_that_a_cpu_maps(
    architecture: str, num_ranks: int, is_merged: bool, tmp_path: Path
) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if "Llama" in architecture else {}
    write_model(tmp_path, architecture, **changes)
    if is_merged:
        merge_files(tmp_path)
    config = read_model_config(tmp_path)
    for rank in range(num_ranks):
        parallel = ParallelContext(rank, num_ranks)
        expected = load_weights(tmp_path, config, torch.float32, parallel, ignore)
        with open_parts(tmp_path, config, parallel) as parts:
            copied = copy_to_device(parts, torch.float32, CPU, ignore, piece_bytes=SMALL_PIECES)
        assert copied.keys() == expected.keys()
        assert all(same_bits(copied[name], expected[name]) for name in expected)
        assert all(tensor.is_contiguous() for tensor in copied.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_changes_on_the_way_as_on_a_cpu(
    stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    convert_files(tmp_path, stored)
    config, parallel = read_model_config(tmp_path), ParallelContext(1, 2)
    expected = load_weights(tmp_path, config, dtype, parallel, ignore)
    with open_parts(tmp_path, config, parallel) as parts:
        copied = copy_to_device(parts, dtype, CPU, ignore, piece_bytes=SMALL_PIECES)
    assert all(same_bits(copied[name], expected[name]) for name in expected)


def test_tied_head_takes_no_memory_on_the_device(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, path)
    config, parallel = read_model_config(tmp_path), ParallelContext()
    with open_parts(tmp_path, config, parallel) as parts:
        assert "lm_head.weight" not in copy_to_device(parts, torch.float32, CPU, ignore)
    assert "lm_head.weight" not in dummy_weights(config, torch.float32, parallel, ignore)


def test_weights_allocated_in_inference_mode_are_copied_too() -> None:
    parts = numbered_parts(6, 4)
    with torch.inference_mode():
        copied = copy_to_device(parts, torch.int32, CPU, ignore, piece_bytes=32)
    assert torch.equal(copied["weight"], torch.cat(parts["weight"]))


def test_progress_comes_on_the_callers_thread_and_ends_with_all_bytes() -> None:
    seen: list[tuple[int, int]] = []
    threads = set()

    def on_bytes(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(threading.current_thread())

    copied = copy_to_device(numbered_parts(100, 50), torch.int32, CPU, on_bytes, piece_bytes=64)
    total = copied["weight"].nbytes
    assert threads == {threading.current_thread()}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {all_bytes for _, all_bytes in seen} == {total}
    assert seen[-1][0] == total
    assert reader_threads() == []


NUM_PIECES = 1000
NUM_BEFORE_STOP = 20


class StoppedReaders:
    """Give out some pieces, then wait until the list of them is cleared, however threads run."""

    def __init__(self) -> None:
        self.num_taken = 0
        self.was_stopped = True
        self.lock = threading.Lock()

    def take(self, pieces: deque[Piece]) -> Piece | None:
        with self.lock:
            self.num_taken += 1
            if self.num_taken <= NUM_BEFORE_STOP:
                return pieces.popleft()
        deadline = time.monotonic() + 10
        while pieces:
            if time.monotonic() > deadline:
                self.was_stopped = False
                return None
            time.sleep(0.001)
        return None


class FailingBuffers(device_weights._Buffers):
    """Buffers whose copy of the weight's row 10 fails."""

    failure: BaseException

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> int:
        if source[0, 0] == 80:
            raise self.failure
        return super().copy(source, target)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> StoppedReaders:
    stopped = StoppedReaders()
    monkeypatch.setattr(device_weights, "_take", stopped.take)
    return stopped


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        (RuntimeError("the device is lost"), ConfigError, r"of 32000 bytes .*the device is lost"),
        (torch.OutOfMemoryError("full"), CapacityError, "The weights need"),
        (TypeError("a bug"), TypeError, "a bug"),
        (SystemExit(), SystemExit, "^$"),
    ],
)
def test_failure_of_a_reader_stops_all_and_is_the_cause(
    failure: BaseException,
    error: type[BaseException],
    message: str,
    stopped: StoppedReaders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_weights, "_Buffers", FailingBuffers)
    monkeypatch.setattr(FailingBuffers, "failure", failure, raising=False)
    with pytest.raises(error, match=message) as raised:
        copy_to_device(numbered_parts(NUM_PIECES), torch.int32, CPU, ignore, piece_bytes=32)
    assert failure in (raised.value, raised.value.__cause__)
    assert stopped.was_stopped
    assert reader_threads() == []


def test_failure_of_the_listener_stops_the_readers(stopped: StoppedReaders) -> None:
    def on_bytes(done: int, total: int) -> None:
        raise ConnectionError("the listener is gone")

    with pytest.raises(ConnectionError, match="the listener is gone"):
        copy_to_device(numbered_parts(NUM_PIECES), torch.int32, CPU, on_bytes, piece_bytes=32)
    assert stopped.was_stopped
    assert reader_threads() == []


def write_large_file(path: Path) -> dict[str, torch.Tensor]:
    """Write 640 MB: one tensor of 512 MB, and others that need conversion or are narrow."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "large": torch.randn(65536, 4096, generator=generator).to(torch.bfloat16),
        "float32": torch.randn(5000, 4097, generator=generator),
        "vector": torch.randn(3_000_001, generator=generator).to(torch.float16),
        "tall": torch.randn(8_000_000, 1, generator=generator).to(torch.bfloat16),
    }
    save_file(tensors, path)
    return tensors


def mapped_parts(path: Path, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: [file.get_tensor(name)] for name in names}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gpu_has_the_bits_that_a_cpu_maps(
    architecture: str, num_ranks: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    write_model(tmp_path, architecture)
    config = read_model_config(tmp_path)
    for rank in range(num_ranks):
        parallel = ParallelContext(rank, num_ranks)
        expected = load_weights(tmp_path, config, dtype, parallel, ignore)
        on_gpu = load_weights(tmp_path, config, dtype, parallel, ignore, CUDA)
        assert on_gpu.keys() == expected.keys()
        assert all(tensor.is_cuda for tensor in on_gpu.values())
        assert all(same_bits(on_gpu[name], expected[name]) for name in expected)


@pytest.mark.gpu
@needs_cuda
def test_gpu_takes_a_large_file_and_little_memory_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    expected = write_large_file(path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seen: list[tuple[int, int]] = []
    copied = copy_to_device(
        mapped_parts(path, list(expected)),
        torch.bfloat16,
        CUDA,
        lambda done, total: seen.append((done, total)),
    )
    weights_bytes = sum(tensor.nbytes for tensor in copied.values())
    beside = torch.cuda.max_memory_allocated() - before - weights_bytes
    assert beside <= NUM_READERS * PIECE_BYTES + (1 << 20), beside
    assert torch.cuda.memory_allocated() - before < weights_bytes + (8 << 20)  # rounded up
    assert seen[-1] == (weights_bytes, weights_bytes)
    for name, tensor in expected.items():
        assert same_bits(copied[name], tensor.to(torch.bfloat16)), name


@pytest.mark.gpu
@needs_cuda
def test_gpu_draws_the_same_dummy_weights_every_time_and_for_every_rank(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", hidden_size=512, intermediate_size=1024)
    config = read_model_config(tmp_path)
    first, second = (
        dummy_weights(config, torch.bfloat16, ParallelContext(), ignore, CUDA) for _ in range(2)
    )
    assert all(same_bits(first[name], second[name]) for name in first)
    down = "model.layers.0.mlp.down_proj.weight"
    assert first[down].is_cuda
    assert abs(first[down].float().std().item() - 0.02) < 0.0005
    rank = dummy_weights(config, torch.bfloat16, ParallelContext(1, 2), ignore, CUDA)
    assert same_bits(rank[down], first[down][:, 512:].contiguous())


@pytest.mark.gpu
@needs_cuda
def test_weights_larger_than_the_gpu_are_refused_with_both_sizes() -> None:
    with pytest.raises(CapacityError, match=r"need 2048\.00 GiB on cuda, and \d+\.\d\d GiB of its"):
        allocate_weights({"weight": (1 << 20, 1 << 20)}, torch.bfloat16, CUDA)
