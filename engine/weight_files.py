"""Which files of a model's folder hold its weights.

An index decides if there is one. Otherwise the folder must leave no doubt: files whose names do not
say that they are copies for other programs are refused, because one of them might be the newer.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.errors import ConfigError, UnsupportedModelError
from paceline.model_files.json_object import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
# The same weights once more: in Mistral's own form, and in another precision (`model.fp16…`).
_CONSOLIDATED = re.compile(r"consolidated.*\.safetensors")
_VARIANT = re.compile(r"model(-\d+-of-\d+)?\.[\w-]+\.safetensors")
# What a LoRA adapter adds to a model: transformers applies it when it loads the folder.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_SHOWN_NAMES = 5


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The files to read."""

    paths: tuple[Path, ...]
    index: Path | None = None
    places: Mapping[str, str] | None = None
    """By tensor, the name of the file that the index says has it; None without an index."""


def find_weight_files(folder: Path) -> WeightFiles:
    """Choose the safetensors files of a folder.

    Raises ConfigError if a file is missing or if it is unclear which files belong to the model.
    """
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    adapter = [name for name in _ADAPTER if (folder / name).exists()]
    if adapter:
        raise UnsupportedModelError(
            f"{folder} has {adapter[0]}: a LoRA adapter, which is not implemented, and without it "
            "the model would be another one. Merge it into the weights (peft: merge_and_unload), "
            "or remove the adapter's files to serve the model without it."
        )
    index = folder / INDEX
    if index.exists():
        return _indexed(index, names)
    if SINGLE in names:
        _refuse_others(folder, names, [SINGLE], f"{SINGLE} is the whole model")
        return WeightFiles((folder / SINGLE,))
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if shards:
        _check_shards(folder, shards)
        _refuse_others(folder, names, shards, f"there is no {INDEX} that says which belong")
        return WeightFiles(tuple(folder / name for name in shards))
    return WeightFiles((_only_file(folder, names),))


def join_names(names: Iterable[str]) -> str:
    """List names for a message, the first few if they are many."""
    listed = list(names)
    return ", ".join(listed[:_SHOWN_NAMES]) + (", …" if len(listed) > _SHOWN_NAMES else "")


def _indexed(index: Path, names: Sequence[str]) -> WeightFiles:
    folder = index.parent
    places = _read_index(index)
    wanted = sorted(set(places.values()))
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{index} names {len(wanted)} files, and {len(missing)} of them are not there: "
            f"{join_names(missing)}. Download the model again."
        )
    if SINGLE in names and SINGLE not in wanted:
        raise ConfigError(
            f"{folder} has {SINGLE} and an index that names other files ({join_names(wanted)}): "
            "which of the two is the model is unclear. Remove the one that is left over."
        )
    return WeightFiles(tuple(folder / name for name in wanted), index, places)


def _read_index(index: Path) -> dict[str, str]:
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigError(
            f"{index} has no weight_map, which says what file each tensor is in. Download the "
            "model again."
        )
    wrong = [
        f"{tensor} in {name!r}"
        for tensor, name in places.items()
        if not isinstance(name, str)
        or Path(name).name != name
        or Path(name).suffix != ".safetensors"
    ]
    if wrong:
        raise ConfigError(
            f"The weight_map of {index} puts {join_names(wrong)}; it must name .safetensors "
            "files of its own folder. Download the model again."
        )
    return places


def _check_shards(folder: Path, shards: Sequence[str]) -> None:
    """Without an index, the shards must be one complete set."""
    parsed = [match.groups() for name in shards if (match := _SHARD.fullmatch(name))]
    totals = sorted({total for _, total in parsed})
    if len(totals) > 1:
        raise ConfigError(
            f"{folder} has shards of {len(totals)} sets (of {' and of '.join(totals)}) and no "
            f"{INDEX} that says which is the model. Remove the files that are left over from "
            "another save."
        )
    present = {int(number) for number, _ in parsed}
    missing = sorted(set(range(1, int(totals[0]) + 1)) - present)
    if missing:
        raise ConfigError(
            f"{folder} has {len(present)} of {int(totals[0])} shards, and no {INDEX}; number "
            f"{join_names(map(str, missing))} is not there. Download the model again."
        )


def _refuse_others(folder: Path, names: Sequence[str], chosen: Sequence[str], reason: str) -> None:
    others = [name for name in names if name not in chosen and not _is_copy(name)]
    if others:
        raise ConfigError(
            f"{folder} also has {join_names(others)}, and {reason}. Move files that are not part "
            "of the model elsewhere."
        )


def _only_file(folder: Path, names: Sequence[str]) -> Path:
    """Take a file of any other name, if it is the only one."""
    own = [name for name in names if not _is_copy(name)]
    if len(own) == 1:
        return folder / own[0]
    if own:
        raise ConfigError(
            f"{folder} has {len(own)} .safetensors files and no {INDEX} that says which belong to "
            f"the model: {join_names(own)}. Download the model again."
        )
    consolidated = [name for name in names if _CONSOLIDATED.fullmatch(name)]
    if consolidated:
        raise ConfigError(
            f"{folder} has its weights in Mistral's own form only ({join_names(consolidated)}), "
            f"which names tensors differently and is not read. Download {SINGLE} or the files "
            f"model-*.safetensors with {INDEX} too, or convert the folder with transformers' "
            "convert_mistral_weights_to_hf.py."
        )
    if names:
        raise ConfigError(
            f"{folder} has its weights as a variant only ({join_names(names)}). Rename the file to "
            f"{SINGLE}, or save the model again without a variant."
        )
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f" but {pickles[0]}, a format that can run code, which is never read" if pickles else ""
    raise ConfigError(
        f"{folder} has no .safetensors file{found}. Set model.path to a folder with "
        "safetensors, or model.load_format to dummy for random weights."
    )


def _is_copy(name: str) -> bool:
    return bool(_CONSOLIDATED.fullmatch(name) or _VARIANT.fullmatch(name))
