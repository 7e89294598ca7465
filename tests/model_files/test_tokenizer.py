"""A folder's tokenizer: whatever file names a special token, ids are those of transformers."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import BOS_ID, EOS_ID, byte_ids, byte_tokenizer, sentencepiece_tokenizer

from paceline.errors import ConfigError, PacelineError, UnsupportedModelError
from paceline.model_files.tokenizer import FolderTokenizer, read_tokenizer

FIRST_NEW_ID = EOS_ID + 1
# In tokenizer.json as special tokens; a plain entry of its vocabulary; nowhere in it.
TOKENS = ["<bos>", "<eos>", "a", "<new1>", "<new2>", "<new3>"]
NEW = ["<new1>", "<new2>", "<new3>"]
ROLES = ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token"]
TEXT = "x<bos>a <new1>y <new2> <new3>a<eos>"


def write(folder: Path, adds_bos: bool = False, **files: object) -> Path:
    """Write tokenizer.json and other files, by their names without .json."""
    byte_tokenizer(adds_bos=adds_bos).save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def special(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "special": True, "normalized": False} | flags


def encode(read: FolderTokenizer, text: str) -> list[int]:
    ids: list[int] = read.tokenizer.encode(text).ids
    return ids


def texts(read: FolderTokenizer) -> Mapping[str, str]:
    return {role: token.text for role, token in read.roles.items()}


def as_objects(value: str | list[str], strips: set[str]) -> Any:
    """Write tokens as transformers saves them, with how they match."""
    if isinstance(value, list):
        return [as_objects(text, strips) for text in value]
    return {"__type": "AddedToken", **special(value, lstrip=value in strips)}


@st.composite
def folders(draw: st.DrawFn) -> dict[str, Any]:
    """Files that name any of the tokens in any of their ways."""
    roles = st.dictionaries(st.sampled_from(ROLES), st.sampled_from(TOKENS), max_size=3)
    extra = st.lists(st.sampled_from(TOKENS), unique=True, max_size=3)
    key = draw(st.sampled_from(["extra_special_tokens", "additional_special_tokens"]))
    config: dict[str, Any] = draw(roles) | {key: draw(extra)}
    if draw(st.booleans()):
        strips = draw(st.sets(st.sampled_from(TOKENS)))
        config = {name: as_objects(value, strips) for name, value in config.items()}
    placed = draw(st.lists(st.sampled_from(NEW), unique=True))
    ids = {text: FIRST_NEW_ID + number for number, text in enumerate(placed)}
    files: dict[str, Any] = {"tokenizer_config": config}
    if draw(st.booleans()):
        decoder = {str(token_id): special(text) for text, token_id in ids.items()}
        decoder |= {str(BOS_ID): special("<bos>", rstrip=draw(st.booleans()))}
        config["added_tokens_decoder"] = decoder
        return files
    if draw(st.booleans()):
        files["added_tokens"] = ids
    if draw(st.booleans()):
        files["special_tokens_map"] = draw(roles)
    return files


@settings(max_examples=80, deadline=None)
@given(files=folders())
def test_ids_and_names_of_templates_are_those_of_transformers(files: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        folder = write(Path(name), **files)
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        ours = read_tokenizer(folder)
    assert encode(ours, TEXT) == reference(TEXT).input_ids
    assert texts(ours) == reference.special_tokens_map
    assert ours.tokenizer.get_vocab() == reference.get_vocab()
    for role, token in ours.roles.items():
        assert token.token_id == getattr(reference, f"{role}_id")


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<new1>": FIRST_NEW_ID}},
        {"tokenizer_config": {"added_tokens_decoder": {FIRST_NEW_ID: special("<new1>")}}},
        {"special_tokens_map": {"pad_token": "<new1>"}},
        {"special_tokens_map": {"pad_token": {"content": "<new1>", "lstrip": False}}},
        {"special_tokens_map": {"additional_special_tokens": ["<new1>"]}},
        {"special_tokens_map": {"additional_special_tokens": [{"content": "<new1>"}]}},
        {"tokenizer_config": {"additional_special_tokens": ["<new1>"]}},
        {"tokenizer_config": {"extra_special_tokens": ["<new1>"]}},
        {"tokenizer_config": {"extra_special_tokens": {"image_token": "<new1>"}}},
        {"tokenizer_config": {"image_token": "<new1>"}},
        {"tokenizer_config": {"pad_token": "<new1>"}},
        {"tokenizer_config": {"pad_token": {"content": "<new1>"}}},
    ],
)
def test_token_that_one_file_names_is_one_token(files: dict[str, Any], tmp_path: Path) -> None:
    read = read_tokenizer(write(tmp_path, **files))
    assert encode(read, "x<new1>y") == [*byte_ids("x"), FIRST_NEW_ID, *byte_ids("y")]


def test_older_file_fills_the_roles_that_the_newer_form_leaves_out(tmp_path: Path) -> None:
    config = {"added_tokens_decoder": {BOS_ID: special("<bos>")}, "bos_token": "<bos>"}
    older = {"eos_token": "<eos>", "bos_token": "<eos>"}
    read = read_tokenizer(write(tmp_path, tokenizer_config=config, special_tokens_map=older))
    assert texts(read) == {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert read.roles["eos_token"].file == "special_tokens_map.json"


def test_token_that_only_a_passed_over_file_names_is_refused(tmp_path: Path) -> None:
    write(
        tmp_path,
        tokenizer_config={"added_tokens_decoder": {BOS_ID: special("<bos>")}},
        special_tokens_map={"additional_special_tokens": ["<new1>"]},
    )
    with pytest.raises(ConfigError, match=r"special_tokens_map\.json names .*'<new1>'"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<eos>": 7}},
        {"added_tokens": {"<new1>": FIRST_NEW_ID + 5}},
        {"tokenizer_config": {"added_tokens_decoder": {FIRST_NEW_ID + 5: special("<new1>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {BOS_ID: special("<eos>")}}},
        {"tokenizer_config": {"added_tokens_decoder": {}}, "added_tokens": {"<eos>": 7}},
        {"tokenizer_config": {"eos_token": "<eos>", "eos_token_id": 7}},
        {"tokenizer_config": {"eos_token_id": EOS_ID}},
    ],
)
def test_ids_that_disagree_between_files_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(gives the token|sets eos_token_id)"):
        read_tokenizer(write(tmp_path, **files))


@pytest.mark.parametrize(
    ("config", "adds_bos", "ids"),
    [
        ({}, True, [BOS_ID, *byte_ids("a")]),
        ({"add_bos_token": True}, True, [BOS_ID, *byte_ids("a")]),
        ({"add_bos_token": False}, True, byte_ids("a")),
        ({"add_bos_token": True}, False, [BOS_ID, *byte_ids("a")]),
        ({"add_bos_token": None}, False, byte_ids("a")),
        ({"add_eos_token": True}, False, [*byte_ids("a"), EOS_ID]),
        ({"add_eos_token": True}, True, [BOS_ID, *byte_ids("a"), EOS_ID]),
        ({"add_bos_token": True, "add_eos_token": True}, False, [BOS_ID, *byte_ids("a"), EOS_ID]),
        ({"add_bos_token": False, "add_eos_token": False}, False, byte_ids("a")),
    ],
)
def test_keys_say_whether_text_begins_and_ends_with_a_token(
    config: dict[str, Any], adds_bos: bool, ids: list[int], tmp_path: Path
) -> None:
    config |= {"bos_token": "<bos>", "eos_token": "<eos>"}
    assert encode(read_tokenizer(write(tmp_path, adds_bos, tokenizer_config=config)), "a") == ids


def test_token_to_begin_with_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file names the bos_token"):
        read_tokenizer(write(tmp_path, tokenizer_config={"add_bos_token": True}))


def test_prefix_space_that_contradicts_the_tokenizer_is_refused(tmp_path: Path) -> None:
    read_tokenizer(write(tmp_path, tokenizer_config={"add_prefix_space": False}))
    with pytest.raises(ConfigError, match="add_prefix_space to True"):
        read_tokenizer(write(tmp_path, tokenizer_config={"add_prefix_space": True}))
    sentencepiece_tokenizer(["▁a"]).save(str(tmp_path / "tokenizer.json"))
    read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    with pytest.raises(ConfigError, match="add_prefix_space to False"):
        read_tokenizer(tmp_path)


def test_special_tokens_are_split_if_the_folder_says_so(tmp_path: Path) -> None:
    config = {"split_special_tokens": True}
    folder = write(tmp_path, tokenizer_config=config)
    assert encode(read_tokenizer(folder), "<eos>") == byte_ids("<eos>")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert reference("<eos>").input_ids == byte_ids("<eos>")


@pytest.mark.parametrize("config", [{}, {"pad_token": None}, {"eos_token": "<eos>"}])
def test_classes_with_tokens_of_their_own_have_them(config: dict[str, Any], tmp_path: Path) -> None:
    """They are special even where they are plain words of the vocabulary."""
    backend = json.loads(byte_tokenizer().to_str())
    backend["model"]["vocab"] |= {"<|endoftext|>": 300, "<bos>": BOS_ID, "<eos>": EOS_ID}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    config |= {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    assert texts(ours) == reference.special_tokens_map
    assert encode(ours, "a<|endoftext|>") == [*byte_ids("a"), 300]
    assert encode(ours, "a<|endoftext|>") == reference("a<|endoftext|>").input_ids


def qwen_tokenizer(**options: Any) -> Any:
    vocab = byte_tokenizer().get_vocab() | {"he": 300, "<|endoftext|>": 301}
    return transformers.Qwen2Tokenizer(vocab=vocab, merges=[("h", "e")], **options)


def llama_tokenizer(**options: Any) -> Any:
    letters = ["▁", *"Helowrd", "▁w"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    return transformers.LlamaTokenizer(vocab=vocab, merges=[("▁", "w")], **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (qwen_tokenizer, {}),
        (qwen_tokenizer, {"eos_token": "<|im_end|>", "extra_special_tokens": ["<s>"]}),
        (llama_tokenizer, {}),
        (llama_tokenizer, {"add_bos_token": True}),
        (llama_tokenizer, {"add_bos_token": False, "add_eos_token": True}),
        (llama_tokenizer, {"add_prefix_space": False}),
        (llama_tokenizer, {"pad_token": "<|im_end|>", "legacy": True}),
    ],
)
def test_folders_that_transformers_writes_for_each_family_give_its_ids(
    make: Callable[..., Any], options: dict[str, Any], tmp_path: Path
) -> None:
    make(**options).save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = read_tokenizer(tmp_path)
    text = "Hello  world, it's <|im_end|> 1234\n\n é世界 <s> x </s>"
    assert encode(ours, text) == reference(text).input_ids
    assert texts(ours) == reference.special_tokens_map


def test_tokenizer_that_makes_tokens_at_random_is_refused(tmp_path: Path) -> None:
    backend = json.loads(byte_tokenizer().to_str())
    backend["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(UnsupportedModelError, match="dropout"):
        read_tokenizer(tmp_path)


def test_files_are_read_as_utf_8(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "added_tokens.json").write_bytes(f'{{"<｜é｜>": {FIRST_NEW_ID}}}'.encode())
    assert encode(read_tokenizer(tmp_path), "<｜é｜>") == [FIRST_NEW_ID]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config", "["),
        ("tokenizer_config", "[]"),
        ("special_tokens_map", "3"),
        ("added_tokens", '{"a": "b"}'),
        ("tokenizer_config", '{"eos_token": 3}'),
        ("tokenizer_config", '{"added_tokens_decoder": []}'),
        ("tokenizer_config", '{"added_tokens_decoder": {"1": {}}}'),
        ("tokenizer_config", '{"extra_special_tokens": "<a>"}'),
        ("tokenizer_config", '{"extra_special_tokens": [3]}'),
        ("tokenizer_config", '{"add_bos_token": "yes"}'),
        ("special_tokens_map", '{"surprise": 3}'),
    ],
)
def test_file_that_makes_no_sense_is_named(name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(PacelineError, match=rf"{name}\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_lower_case", True),
        ("auto_map", {"AutoTokenizer": ["a.B", None]}),
        ("fix_mistral_regex", True),
        ("surprise", 3),
    ],
)
def test_key_that_could_change_tokens_is_refused_by_name(
    key: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        read_tokenizer(write(tmp_path, tokenizer_config={key: value}))


def test_keys_that_transformers_writes_are_all_known(tmp_path: Path) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path)
    assert texts(read_tokenizer(tmp_path)) == tokenizer.special_tokens_map


@pytest.mark.parametrize(
    "config",
    [
        # As released with models of each family.
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "add_prefix_space": None,
            "clean_up_tokenization_spaces": False,
            "legacy": False,
            "model_max_length": 1000000000000000019884624838656,
            "padding_side": "right",
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
            "bos_token": "<bos>",
            "eos_token": "<eos>",
        },
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "additional_special_tokens": ["<bos>", "<eos>"],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<bos>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
        {
            "bos_token": "<bos>",
            "clean_up_tokenization_spaces": True,
            "eos_token": "<eos>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    ],
)
def test_configurations_of_released_models_are_read(config: dict[str, Any], tmp_path: Path) -> None:
    read_tokenizer(write(tmp_path, tokenizer_config=config))
