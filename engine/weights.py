"""Weights: what tensors a model has, and how a folder's files become them.

On a CPU, a tensor whose dtype and layout are the engine's already is mapped from its file, not
copied, so that all workers of a machine share its pages. Others are merged or converted into memory
of their own. To other devices `device_weights` copies.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from paceline.engine.device_weights import (
    OnBytes,
    allocate_weights,
    copy_to_device,
    synchronize,
)
from paceline.engine.model_config import ModelConfig
from paceline.engine.parallel import ParallelContext
from paceline.engine.tensor_files import TensorFiles, check_tensors
from paceline.errors import ConfigError

DUMMY_SEED = 0
DUMMY_DEVIATION = 0.02

CPU = torch.device("cpu")


class Part(NamedTuple):
    """A tensor as folders in Hugging Face's form name it."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the engine: its parts, one below the other."""

    name: str
    parts: tuple[Part, ...]
    axis: int | None
    """Dimension that tensor-parallel ranks divide, in each part; None: every rank has all."""
    rank_zero_only: bool = False
    """A bias added after the sum over ranks is added once."""

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return (sum(part.shape[0] for part in self.parts), *first[1:])


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield the tensors of a model of the Llama family, merged as the engine wants them."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    yield _single("model.embed_tokens.weight", (vocab, hidden))
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
        gate_up = (("gate_proj", inner), ("up_proj", inner))
        yield _single(f"{prefix}.input_layernorm.weight", (hidden,))
        yield from _merged(f"{attention}", "qkv_proj", qkv, hidden, config.qkv_bias)
        if config.qk_norm:
            yield _single(f"{attention}.q_norm.weight", (config.head_dim,))
            yield _single(f"{attention}.k_norm.weight", (config.head_dim,))
        yield _single(f"{attention}.o_proj.weight", (hidden, q_size), 1)
        if config.o_bias:
            yield _single(f"{attention}.o_proj.bias", (hidden,), rank_zero_only=True)
        yield _single(f"{prefix}.post_attention_layernorm.weight", (hidden,))
        yield from _merged(mlp, "gate_up_proj", gate_up, hidden, config.mlp_bias)
        yield _single(f"{mlp}.down_proj.weight", (hidden, inner), 1)
        if config.mlp_bias:
            yield _single(f"{mlp}.down_proj.bias", (hidden,), rank_zero_only=True)
    yield _single("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield _single("lm_head.weight", (vocab, hidden))


def _single(
    name: str, shape: tuple[int, ...], axis: int | None = None, *, rank_zero_only: bool = False
) -> TensorSpec:
    return TensorSpec(name, (Part(name, shape),), axis, rank_zero_only)


def _merged(
    prefix: str, name: str, parts: Sequence[tuple[str, int]], width: int, has_bias: bool
) -> Iterator[TensorSpec]:
    weights = tuple(Part(f"{prefix}.{part}.weight", (size, width)) for part, size in parts)
    yield TensorSpec(f"{prefix}.{name}.weight", weights, 0)
    if has_bias:
        biases = tuple(Part(f"{prefix}.{part}.bias", (size,)) for part, size in parts)
        yield TensorSpec(f"{prefix}.{name}.bias", biases, 0)


def load_weights(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    parallel: ParallelContext,
    on_bytes: OnBytes,
    device: torch.device = CPU,
) -> dict[str, torch.Tensor]:
    """Load this rank's tensors from the folder's safetensors files, by TensorSpec name.

    Raises ConfigError or UnsupportedModelError naming every tensor that is missing, unexpected, of
    another shape, of integers, or not finite; CapacityError if they do not fit on the device.
    """
    with open_parts(folder, config, parallel) as parts:
        if device.type == "cpu":
            return _map(parts, dtype, on_bytes, folder)
        tensors = copy_to_device(parts, dtype, device, on_bytes)
    for name, tensor in tensors.items():
        _check_finite(name, tensor, folder)
    return tensors


@contextmanager
def open_parts(
    folder: Path, config: ModelConfig, parallel: ParallelContext
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Yield this rank's share of each part, mapped from the folder's files, by TensorSpec name.

    Raises ConfigError as load_weights does.
    """
    specs = list(tensor_specs(config))
    with TensorFiles(folder) as files:
        _check(files, specs, config)
        yield {spec.name: _parts(files, spec, parallel) for spec in _specs_of_rank(specs, parallel)}


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    parallel: ParallelContext,
    on_bytes: OnBytes,
    device: torch.device = CPU,
) -> dict[str, torch.Tensor]:
    """Fill random weights: normal of deviation 0.02, norms 1, the same in every process.

    They are drawn on the device, so each kind of device has its own.
    """
    specs = _specs_of_rank(tensor_specs(config), parallel)
    shapes = {
        spec.name: [_share(part.shape, spec.axis, parallel) for part in spec.parts]
        for spec in specs
    }
    tensors = allocate_weights(
        {name: (sum(shape[0] for shape in parts), *parts[0][1:]) for name, parts in shapes.items()},
        dtype,
        device,
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    for spec in specs:
        tensor = tensors[spec.name]
        sizes = [shape[0] for shape in shapes[spec.name]]
        for part, rows in zip(spec.parts, torch.split(tensor, sizes), strict=True):
            _fill(rows, part, spec.axis, parallel)
        synchronize(device)
        done += tensor.nbytes
        on_bytes(done, total)
    return tensors


def _fill(rows: torch.Tensor, part: Part, axis: int | None, parallel: ParallelContext) -> None:
    if part.name.endswith("norm.weight"):
        rows.fill_(1.0)
        return
    seed = DUMMY_SEED + zlib.crc32(part.name.encode())
    generator = torch.Generator(rows.device).manual_seed(seed)
    if rows.shape == part.shape:
        rows.normal_(0.0, DUMMY_DEVIATION, generator=generator)
        return
    # Ranks share one model: each draws the part whole and keeps its own share.
    whole = torch.empty(part.shape, dtype=rows.dtype, device=rows.device)
    whole.normal_(0.0, DUMMY_DEVIATION, generator=generator)
    rows.copy_(_slice(whole, axis, parallel))


def _check(files: TensorFiles, specs: Sequence[TensorSpec], config: ModelConfig) -> None:
    expected = {part.name: part.shape for spec in specs for part in spec.parts}
    for spec in specs:
        if spec.name in files.names and spec.name not in expected:
            for part in spec.parts:
                del expected[part.name]
            expected[spec.name] = spec.shape
    check_tensors(
        files,
        expected,
        is_tied=config.tie_word_embeddings,
        says_tied=config.says_tie_word_embeddings,
    )


def _check_finite(name: str, tensor: torch.Tensor, folder: Path) -> None:
    """Refuse infinities and NaNs: of the files, or of a conversion to a narrower range.

    Reads every page of a mapped tensor, so that the first step does not wait for the disk.
    """
    bounds = torch.stack(torch.aminmax(tensor))
    if not bounds.isfinite().all():
        raise ConfigError(
            f"The weight {name} of {folder} is infinite or not a number in {tensor.dtype}. If the "
            "files have another dtype, its values may be too large for this one: set model.dtype "
            "to bfloat16 or float32. Otherwise download the model again."
        )


def _specs_of_rank(specs: Iterable[TensorSpec], parallel: ParallelContext) -> list[TensorSpec]:
    return [spec for spec in specs if not (spec.rank_zero_only and parallel.rank > 0)]


def _parts(files: TensorFiles, spec: TensorSpec, parallel: ParallelContext) -> list[torch.Tensor]:
    if spec.name not in files.names:
        parts = [files.tensor(part.name) for part in spec.parts]
    elif parallel.size == 1 or spec.axis is None:
        parts = [files.tensor(spec.name)]
    else:
        whole = files.tensor(spec.name)
        parts = list(torch.split(whole, [part.shape[0] for part in spec.parts]))
    return [_slice(part, spec.axis, parallel) for part in parts]


def _slice(tensor: torch.Tensor, axis: int | None, parallel: ParallelContext) -> torch.Tensor:
    if axis is None or parallel.size == 1:
        return tensor
    share = _share(tensor.shape, axis, parallel)[axis]
    return tensor.narrow(axis, parallel.rank * share, share)


def _share(shape: tuple[int, ...], axis: int | None, parallel: ParallelContext) -> tuple[int, ...]:
    if axis is None:
        return shape
    share = parallel.share(shape[axis], "rows of a weight")
    return (*shape[:axis], share, *shape[axis + 1 :])


def _map(
    parts: Mapping[str, Sequence[torch.Tensor]], dtype: torch.dtype, on_bytes: OnBytes, folder: Path
) -> dict[str, torch.Tensor]:
    total = sum(part.numel() for pieces in parts.values() for part in pieces) * dtype.itemsize
    done = 0
    tensors: dict[str, torch.Tensor] = {}
    for name, pieces in parts.items():
        whole = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
        tensors[name] = whole.to(dtype).contiguous()
        _check_finite(name, tensors[name], folder)
        done += tensors[name].nbytes
        on_bytes(done, total)
    return tensors
