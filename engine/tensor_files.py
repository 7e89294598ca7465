"""The tensors of a model's safetensors files: opened, mapped, and checked against the model."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from paceline.engine.weight_files import WeightFiles, find_weight_files, join_names
from paceline.errors import ConfigError, UnsupportedModelError

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

_FLOATS = frozenset({"F64", "F32", "BF16", "F16"})
# Files beside the weights that describe how these were quantised.
_QUANTISATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_QUANTISED_ENDINGS = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv"),
    *(".weight_packed", ".absmax", ".quant_map", ".SCB", ".input_scale", ".k_scale", ".v_scale"),
)


class TensorFiles:
    """The tensors of a folder's weight files; entered, it holds the files open.

    Entering raises ConfigError if a file cannot be read, if a tensor is in two files, or if the
    files are not as the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened = ExitStack()
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}

    def __enter__(self) -> Self:
        found = find_weight_files(self.folder)
        with ExitStack() as opened:
            for path in found.paths:
                file = opened.enter_context(_open(path))
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    self._add(name, path.name, file, found)
            self._check_index(found)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype in safetensors' words, such as BF16."""
        dtype: str = self._files[name].get_slice(name).get_dtype()
        return dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor, mapped privately: its pages are the file's until someone writes."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def _add(self, name: str, file_name: str, file: Any, found: WeightFiles) -> None:
        if found.places is not None and found.places.get(name) != file_name:
            says = found.places.get(name, "no file")
            raise ConfigError(
                f"{self.folder / file_name} has the tensor {name}, and {found.index} puts it into "
                f"{says}: the file may be of another save. Download the model again."
            )
        if name in self._files:
            raise ConfigError(
                f"Both {self._places[name]} and {file_name} in {self.folder} have the tensor "
                f"{name}, and which holds is unclear. Download the model again."
            )
        self._files[name] = file
        self._places[name] = file_name

    def _check_index(self, found: WeightFiles) -> None:
        places = found.places or {}
        absent = sorted(f"{name} in {places[name]}" for name in set(places) - self.names)
        if absent:
            raise ConfigError(
                f"{found.index} puts {len(absent)} tensors into files that do not have them: "
                f"{join_names(absent)}. Download the model again."
            )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read as safetensors: {error}. It may be cut short: download the "
            "model again."
        ) from error


def check_tensors(
    files: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    *,
    is_tied: bool,
    says_tied: bool,
) -> None:
    """Check names, shapes and dtypes of all tensors, and the head of a tied model.

    says_tied: whether config.json has the key tie_word_embeddings. Raises ConfigError or
    UnsupportedModelError with the names of the tensors that are wrong.
    """
    missing = sorted(set(expected) - files.names)
    # Old files store the rotary frequencies, which config.json determines.
    extra = sorted(
        name
        for name in files.names - set(expected) - ({HEAD} if is_tied else set())
        if not name.endswith(".rotary_emb.inv_freq")
    )
    _refuse_quantised(files, extra)
    if missing == [HEAD] and not says_tied:
        raise ConfigError(
            f"{files.folder} has no tensor {HEAD}, and its config.json has no tie_word_embeddings, "
            "which means that the head is a tensor of its own. If the model's head is its "
            'embedding, add "tie_word_embeddings": true to config.json; otherwise download the '
            "model again."
        )
    _refuse_prefix(files)
    problems = _problems(files, expected, missing, extra)
    if problems:
        raise ConfigError(
            f"The tensors in {files.folder} are not those of its config.json: "
            f"{'; '.join(problems)}. Download the model again, or correct config.json."
        )
    wrong = sorted(
        f"{name} ({files.dtype(name)})" for name in expected if files.dtype(name) not in _FLOATS
    )
    if wrong:
        raise UnsupportedModelError(
            f"{files.folder} has {len(wrong)} weights that are no floating-point numbers of 16, 32 "
            f"or 64 bits: {join_names(wrong)}. Quantised weights are not implemented: choose the "
            "model's unquantised folder."
        )
    if is_tied and HEAD in files.names:
        _check_tied_head(files)


def _problems(
    files: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    missing: Sequence[str],
    extra: Sequence[str],
) -> list[str]:
    wrong = [
        f"{name} {list(files.shape(name))} instead of {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in files.names and files.shape(name) != shape
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
    return [f"{len(names)} {what}: {join_names(names)}" for what, names in kinds if names]


def _refuse_quantised(files: TensorFiles, extra: Sequence[str]) -> None:
    scales = [name for name in extra if name.endswith(_QUANTISED_ENDINGS)]
    if not scales:
        return
    described = [name for name in _QUANTISATION_FILES if (files.folder / name).exists()]
    by = f" (described by {described[0]})" if described else ""
    raise UnsupportedModelError(
        f"The weights in {files.folder} are quantised{by}: it has {len(scales)} tensors such as "
        f"{scales[0]}. Quantised weights are not implemented: choose the model's unquantised "
        "folder."
    )


def _refuse_prefix(files: TensorFiles) -> None:
    """Name the cause when all tensors are there, under names with another beginning."""
    if EMBEDDING in files.names:
        return
    bare = EMBEDDING.removeprefix("model.")
    if bare in files.names:
        raise ConfigError(
            f"The tensors in {files.folder} have no 'model.' before their names ({bare}): they "
            "were saved from a base model, which has no head to generate with. Save the whole "
            "model: transformers.AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)."
        )
    for name in sorted(files.names):
        if name.endswith((f".{EMBEDDING}", f".{bare}")):
            prefix = name.removesuffix(EMBEDDING).removesuffix(bare)
            raise UnsupportedModelError(
                f"The tensors in {files.folder} have {prefix!r} before their names ({name}): the "
                "language model is a part of something larger, or was saved from inside a wrapper. "
                "Save the language model by itself."
            )


def _check_tied_head(files: TensorFiles) -> None:
    head, embedding = files.tensor(HEAD), files.tensor(EMBEDDING)
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise ConfigError(
            f"{files.folder} has a tensor {HEAD} that differs from {EMBEDDING}, and its "
            "config.json says tie_word_embeddings: true, which means that they are the same. If "
            "the model was trained with a head of its own, set tie_word_embeddings to false; "
            f"otherwise remove {HEAD} from the weights."
        )
