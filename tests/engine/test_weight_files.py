"""Which files hold the weights: the index decides, and a folder that leaves doubt is refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from model_references import make_model, write_model
from safetensors.torch import load_file, save_file

from paceline.engine.model_config import read_model_config
from paceline.engine.model_source import prepare_model
from paceline.engine.parallel import ParallelContext
from paceline.engine.settings import ModelSettings
from paceline.engine.weight_files import find_weight_files
from paceline.engine.weights import load_weights
from paceline.errors import ConfigError, PacelineError

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


def write_shards(folder: Path, *, seed: int = 0, size: str = "60KB") -> list[str]:
    """Write a model in several files with an index; return the files' names."""
    make_model("LlamaForCausalLM", seed).save_pretrained(folder, max_shard_size=size)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    return sorted(set(places.values()))


def load(folder: Path) -> dict[str, torch.Tensor]:
    config = read_model_config(folder)
    return load_weights(folder, config, torch.float32, ParallelContext(), lambda a, b: None)


def edit_index(folder: Path, changes: dict[str, object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).touch()
    return folder


def test_shards_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    old = write_shards(tmp_path / "old", seed=1, size="30KB")
    new = write_shards(tmp_path / "new")
    assert set(old).isdisjoint(new)
    wanted = load(tmp_path / "new")
    for name in old:
        os.link(tmp_path / "old" / name, tmp_path / "new" / name)
    found = load(tmp_path / "new")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_one_complete_set_of_shards_needs_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    wanted = load(tmp_path)
    (tmp_path / INDEX).unlink()
    assert torch.equal(load(tmp_path)[EMBEDDING], wanted[EMBEDDING])


def test_file_of_an_index_that_is_missing_is_named(tmp_path: Path) -> None:
    names = write_shards(tmp_path)
    (tmp_path / names[1]).unlink()
    with pytest.raises(ConfigError, match=f"1 of them are not there: {names[1]}"):
        load(tmp_path)


def test_tensor_must_be_in_the_file_that_the_index_says(tmp_path: Path) -> None:
    names = write_shards(tmp_path)
    place = json.loads((tmp_path / INDEX).read_text())["weight_map"][EMBEDDING]
    other = next(name for name in names if name != place)
    edit_index(tmp_path, {EMBEDDING: other})
    with pytest.raises(ConfigError, match=f"{place} has the tensor {EMBEDDING}.*{other}"):
        load(tmp_path)


def test_tensor_that_only_the_index_has_is_named(tmp_path: Path) -> None:
    names = write_shards(tmp_path)
    edit_index(tmp_path, {"model.extra": names[0]})
    with pytest.raises(ConfigError, match=f"do not have them: model.extra in {names[0]}"):
        load(tmp_path)


def test_tensor_that_the_index_leaves_out_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"][EMBEDDING]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"{EMBEDDING}, and .* puts it into no file"):
        load(tmp_path)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "x.bin", 3, None])
def test_index_names_files_of_its_own_folder_only(place: object, tmp_path: Path) -> None:
    write_shards(tmp_path)
    edit_index(tmp_path, {EMBEDDING: place})
    with pytest.raises(ConfigError, match="files of its own folder"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_index_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ConfigError, match="Download the model again"):
        load(tmp_path)


def test_same_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    names = write_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    tensors = [load_file(tmp_path / name) for name in names[:2]]
    save_file(tensors[0] | tensors[1], tmp_path / names[1])
    with pytest.raises(ConfigError, match=f"Both {names[0]} and {names[1]}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00002.safetensors"], "1 of 2 shards.*number 2 is not there"),
        (
            ["model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"],
            "shards of 2 sets",
        ),
        (["model.safetensors", "model-00001-of-00002.safetensors"], "also has model-00001-of"),
        (["model.safetensors", "model_new.safetensors"], "also has model_new.safetensors"),
        (["one.safetensors", "two.safetensors"], "2 .safetensors files"),
        (["consolidated.safetensors"], "Mistral's own form only"),
        (["consolidated-00001-of-00002.safetensors"], "Mistral's own form only"),
        (["model.fp16.safetensors"], "a variant only"),
        (["model.safetensors", "adapter_model.safetensors"], "a LoRA adapter"),
        (["model.safetensors", "adapter_config.json"], "a LoRA adapter"),
        ([], "no .safetensors file"),
    ],
)
def test_folder_that_leaves_doubt_is_refused_with_the_files(
    names: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PacelineError, match=message):
        find_weight_files(touch(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["merged.safetensors"], ["merged.safetensors"]),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model-00001-of-00002.fp16.safetensors",
                "consolidated.00.safetensors",
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
    ],
)
def test_copies_for_other_programs_are_passed_over(
    names: list[str], chosen: list[str], tmp_path: Path
) -> None:
    found = find_weight_files(touch(tmp_path, *names))
    assert [path.name for path in found.paths] == chosen


def test_whole_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(ConfigError, match="which of the two is the model is unclear"):
        find_weight_files(touch(tmp_path, "model.safetensors"))


def test_revision_follows_the_files_that_are_read_and_no_others(tmp_path: Path) -> None:
    names = write_shards(tmp_path)

    def revision() -> str:
        settings = ModelSettings(path=str(tmp_path))
        return prepare_model(settings, tmp_path, lambda name, share: None).revision

    first = revision()
    touch(tmp_path, "model-00001-of-00099.safetensors", "consolidated.safetensors")
    assert revision() == first
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(index | {"metadata": {}}))
    second = revision()
    assert second != first
    tensors = load_file(tmp_path / names[0])
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / names[0])
    assert revision() not in (first, second)


def test_model_written_in_one_file_is_found(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    assert find_weight_files(tmp_path).paths == (tmp_path / "model.safetensors",)
