"""Weights: what tensors a model has, and how a folder's files become them.

A tensor whose dtype and layout are the engine's already is mapped from its file, not copied, so
that all workers of a machine share its pages. Others are merged or converted into memory of their
own.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open

from paceline.engine.model_config import ModelConfig
from paceline.engine.parallel import ParallelContext
from paceline.errors import ConfigError

PAGE_BYTES = 4096
DUMMY_SEED = 0
DUMMY_DEVIATION = 0.02

OnBytes = Callable[[int, int], None]
"""Called with (bytes ready, bytes in all)."""


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
) -> dict[str, torch.Tensor]:
    """Load this rank's tensors from the folder's safetensors files, by TensorSpec name.

    Raises ConfigError naming every tensor that is missing, unexpected or of another shape.
    """
    specs = list(tensor_specs(config))
    total = sum(math.prod(spec.shape) for spec in specs) * dtype.itemsize
    done = 0
    tensors: dict[str, torch.Tensor] = {}
    with _TensorFiles(folder) as files:
        _check(files, specs, config.tie_word_embeddings)
        for spec in specs:
            if not (spec.rank_zero_only and parallel.rank > 0):
                tensors[spec.name] = _load(files, spec, dtype, parallel)
            done += math.prod(spec.shape) * dtype.itemsize
            on_bytes(done, total)
    return tensors


def dummy_weights(
    config: ModelConfig, dtype: torch.dtype, parallel: ParallelContext, on_bytes: OnBytes
) -> dict[str, torch.Tensor]:
    """Fill random weights: normal of deviation 0.02, norms 1, the same in every process."""
    specs = list(tensor_specs(config))
    total = sum(math.prod(spec.shape) for spec in specs) * dtype.itemsize
    done = 0
    tensors: dict[str, torch.Tensor] = {}
    for spec in specs:
        pieces = [_dummy(part, dtype) for part in spec.parts]
        if not (spec.rank_zero_only and parallel.rank > 0):
            tensors[spec.name] = _join([_slice(piece, spec.axis, parallel) for piece in pieces])
        done += math.prod(spec.shape) * dtype.itemsize
        on_bytes(done, total)
    return tensors


def _dummy(part: Part, dtype: torch.dtype) -> torch.Tensor:
    if part.name.endswith("norm.weight"):
        return torch.ones(part.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(DUMMY_SEED + zlib.crc32(part.name.encode()))
    tensor = torch.empty(part.shape, dtype=dtype)
    return tensor.normal_(0.0, DUMMY_DEVIATION, generator=generator)


class _TensorFiles:
    """The tensors of all safetensors files of a folder, mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        for path in _weight_files(self.folder):
            try:
                file = self._open.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"{path} cannot be read as safetensors: {error}. It may be cut short: download "
                    "the model again."
                ) from error
            self._files.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor, mapped privately: its pages are the file's until someone writes."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("model-*.safetensors"))
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = (
            f" but {pickles[0]}, a format that can run code, which is never read" if pickles else ""
        )
        raise ConfigError(
            f"{folder} has no .safetensors file{found}. Set model.path to a folder with "
            "safetensors, or model.load_format to dummy for random weights."
        )
    return files


def _check(files: _TensorFiles, specs: Sequence[TensorSpec], tied: bool) -> None:
    expected = {part.name: part.shape for spec in specs for part in spec.parts}
    for spec in specs:
        if spec.name in files.names and spec.name not in expected:
            for part in spec.parts:
                del expected[part.name]
            expected[spec.name] = spec.shape
    missing = sorted(set(expected) - files.names)
    extra = files.names - set(expected) - ({"lm_head.weight"} if tied else set())
    # Old files store the rotary frequencies, which config.json determines.
    extra_names = sorted(name for name in extra if not name.endswith(".rotary_emb.inv_freq"))
    wrong = [
        f"{name} {list(files.shape(name))} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in files.names and files.shape(name) != shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", extra_names),
            ("of another shape", wrong),
        )
        if names
    ]
    if problems:
        raise ConfigError(
            f"The tensors in {files.folder} are not those of its config.json: "
            f"{'; '.join(problems)}. Download the model again, or correct config.json."
        )


def _load(
    files: _TensorFiles, spec: TensorSpec, dtype: torch.dtype, parallel: ParallelContext
) -> torch.Tensor:
    if spec.name in files.names:
        whole = files.tensor(spec.name)
        pieces = list(torch.split(whole, [part.shape[0] for part in spec.parts]))
        if parallel.size == 1 or spec.axis is None:
            pieces = [whole]
    else:
        pieces = [files.tensor(part.name) for part in spec.parts]
    tensor = _join([_slice(piece, spec.axis, parallel) for piece in pieces]).to(dtype)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    _touch(tensor)
    return tensor


def _slice(tensor: torch.Tensor, axis: int | None, parallel: ParallelContext) -> torch.Tensor:
    if axis is None or parallel.size == 1:
        return tensor
    share = parallel.share(tensor.shape[axis], "rows of a weight")
    return tensor.narrow(axis, parallel.rank * share, share)


def _join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _touch(tensor: torch.Tensor) -> None:
    """Read a byte of every page, so that the first step does not wait for the disk."""
    tensor.view(-1).view(torch.uint8)[::PAGE_BYTES].sum()
