"""Weights: mapped where they can be, merged where they must, and refused with every wrong name."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_references import SHAPE, logits_of, write_model
from safetensors.torch import load_file, save_file

from paceline.engine.cpu.step_batch import DecodeRows, PrefillRow, StepBatch
from paceline.engine.cpu.step_kernels import CpuStepKernels
from paceline.engine.model_config import read_model_config
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.weights import dummy_weights, load_weights, tensor_specs
from paceline.errors import ConfigError, PacelineError, UnsupportedModelError
from paceline.kernels.prefill_attention import plan_context

ALONE = ParallelContext()


def ignore(done: int, total: int) -> None:
    pass


def load(folder: Path, parallel: ParallelContext = ALONE) -> dict[str, torch.Tensor]:
    config = read_model_config(folder)
    return load_weights(folder, config, torch.float32, parallel, ignore)


def merge_file(folder: Path) -> None:
    """Rewrite a folder's weights in the engine's layout."""
    save_file(load(folder), folder / "merged.safetensors")
    (folder / "merged.safetensors").replace(folder / "model.safetensors")


def test_merged_and_separate_files_give_the_same_tensors(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen2ForCausalLM")
    separate = load(tmp_path)
    merge_file(tmp_path)
    merged = load(tmp_path)
    assert separate.keys() == merged.keys()
    assert all(torch.equal(separate[name], merged[name]) for name in separate)


def test_progress_grows_to_the_bytes_of_the_model(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    seen: list[tuple[int, int]] = []
    config = read_model_config(tmp_path)
    tensors = load_weights(
        tmp_path, config, torch.float32, ALONE, lambda done, total: seen.append((done, total))
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_wrong_tensors_are_all_named(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    hidden = SHAPE["hidden_size"]
    tensors["model.norm.weight"] = torch.zeros(hidden + 1)
    save_file(tensors, path)
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path)
    message = str(refusal.value)
    assert "1 missing: model.layers.1.self_attn.k_proj.weight" in message
    assert "1 unexpected: model.layers.0.self_attn.sinks" in message
    assert f"model.norm.weight [{hidden + 1}] instead of [{hidden}]" in message


def test_biases_of_an_architecture_without_any_are_refused(tmp_path: Path) -> None:
    """The key attention_bias says nothing there, so the tensors decide."""
    write_model(tmp_path, "MistralForCausalLM")
    path = tmp_path / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(load_file(path) | {name: torch.zeros(64)}, path)
    with pytest.raises(ConfigError, match=f"1 unexpected: {name}"):
        load(tmp_path)


def test_tied_head_may_be_in_the_file_and_is_the_embedding(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert "lm_head.weight" not in load(tmp_path)


def test_tied_head_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[3, 5] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight that differs .* set tie_word_embed"):
        load(tmp_path)


def test_tied_checkpoint_whose_config_does_not_say_so_is_told_the_key(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match='add "tie_word_embeddings": true'):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_not_floats_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(dtype)}, path)
    with pytest.raises(UnsupportedModelError, match=rf"1 weights .* {name} \("):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_float_types_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    norm = load(tmp_path)["model.norm.weight"]
    assert norm.dtype is torch.float32
    assert torch.equal(norm, tensors["model.norm.weight"].to(torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float, tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][1] = value
    save_file(tensors, path)
    with pytest.raises(
        ConfigError, match=r"The weight model\.norm\.weight of .* is infinite or not a number"
    ):
        load(tmp_path)


def test_values_that_a_narrower_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][0, 0] = 1e5
    save_file(tensors, path)
    config = read_model_config(tmp_path)
    with pytest.raises(
        ConfigError, match=r"lm_head\.weight of .* in torch\.float16.*set model\.dtype"
    ):
        load_weights(tmp_path, config, torch.float16, ALONE, ignore)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.removeprefix("model."), "no 'model.' before their names"),
        (lambda name: f"language_model.{name}", "'language_model.' before their names"),
        (lambda name: f"_orig_mod.{name}", "'_orig_mod.' before their names"),
    ],
)
def test_tensors_under_other_names_are_refused_with_the_cause(
    rename: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(PacelineError, match=message):
        load(tmp_path)


def test_quantised_tensors_are_called_so(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").to(torch.int32)
    save_file(tensors, path)
    (tmp_path / "quantize_config.json").write_text("{}")
    with pytest.raises(
        UnsupportedModelError, match=r"quantised \(described by quantize_config\.json\)"
    ):
        load(tmp_path)


def test_folder_without_safetensors_is_refused_even_if_it_has_pickles(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, a format that can run code"):
        load(tmp_path)


def test_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cut short"):
        load(tmp_path)


def test_dummy_weights_are_the_same_every_time_and_have_every_tensor(tmp_path: Path) -> None:
    write_model(tmp_path, "Qwen3ForCausalLM")
    config = read_model_config(tmp_path)
    first = dummy_weights(config, torch.float32, ALONE, ignore)
    second = dummy_weights(config, torch.float32, ALONE, ignore)
    assert set(first) == {spec.name for spec in tensor_specs(config)}
    for spec in tensor_specs(config):
        assert tuple(first[spec.name].shape) == spec.shape
        assert torch.equal(first[spec.name], second[spec.name])
    assert not torch.equal(
        first["model.layers.0.mlp.down_proj.weight"], first["model.layers.1.mlp.down_proj.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_of_ranks_are_shares_of_one_model(dtype: torch.dtype, tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", attention_bias=True)
    config = read_model_config(tmp_path)
    whole = dummy_weights(config, dtype, ALONE, ignore)
    first, second = (
        dummy_weights(config, dtype, ParallelContext(rank, 2), ignore) for rank in range(2)
    )
    for spec in tensor_specs(config):
        if spec.rank_zero_only:
            assert spec.name not in second
            assert torch.equal(first[spec.name], whole[spec.name])
            continue
        if spec.axis is None:
            assert torch.equal(second[spec.name], whole[spec.name])
            continue
        sizes = [part.shape[0] for part in spec.parts]
        shares = [size // 2 if spec.axis == 0 else size for size in sizes]
        for part, *ranks in zip(
            whole[spec.name].split(sizes),
            first[spec.name].split(shares),
            second[spec.name].split(shares),
            strict=True,
        ):
            assert torch.equal(part, torch.cat(ranks, dim=spec.axis))


SHARE_OF_CLEAN_PAGES = """
import sys, torch
from pathlib import Path
from paceline.engine.model_config import read_model_config
from paceline.engine.parallel import ParallelContext
from paceline.engine.weights import load_weights
folder = Path(sys.argv[1])
tensors = load_weights(
    folder, read_model_config(folder), torch.float32, ParallelContext(), lambda a, b: None
)
print("loaded", flush=True)
sys.stdin.readline()
inside, sizes = False, {}
for line in open("/proc/self/smaps"):
    words = line.split()
    if "-" in words[0] and not words[0].endswith(":"):
        inside = line.rstrip().endswith("model.safetensors")
    elif inside:
        sizes[words[0]] = sizes.get(words[0], 0) + int(words[1]) if words[1].isdigit() else 0
weights = sum(tensor.nbytes for tensor in tensors.values()) // 1024
print(weights, sizes["Shared_Clean:"], sizes["Private_Dirty:"])
"""


def test_two_processes_share_the_pages_of_a_merged_file(tmp_path: Path) -> None:
    write_model(
        tmp_path, "LlamaForCausalLM", hidden_size=512, intermediate_size=2048, vocab_size=4096
    )
    merge_file(tmp_path)
    command = [sys.executable, "-c", SHARE_OF_CLEAN_PAGES, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first, subprocess.Popen(command, **pipes) as second:
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline() == "loaded\n"
        report, _ = first.communicate("\n", timeout=30)
        second.communicate("\n", timeout=30)
    weights_kib, shared_kib, private_kib = map(int, report.split())
    assert weights_kib > 50_000
    assert shared_kib > 0.95 * weights_kib
    assert private_kib < 0.01 * weights_kib


class Ranks:
    """Two ranks as two threads, whose all_reduce adds in shared memory."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=20)
        self._parts: dict[int, torch.Tensor] = {}

    def context(self, rank: int) -> ParallelContext:
        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            self._parts[rank] = tensor
            self._barrier.wait()
            total = self._parts[0] + self._parts[1]
            self._barrier.wait()
            return total

        return ParallelContext(rank, 2, all_reduce)


@pytest.mark.parametrize("is_merged", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_two_ranks_together_compute_what_one_does(
    architecture: str, is_merged: bool, tmp_path: Path
) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if "Llama" in architecture else {}
    model = write_model(tmp_path, architecture, **changes)
    if is_merged:
        merge_file(tmp_path)
    config, tokens = read_model_config(tmp_path), list(range(30))
    ranks, outputs = Ranks(), {}

    def run(rank: int) -> None:
        parallel = ranks.context(rank)
        kv = torch.zeros(2, config.num_layers, 1, 2, 16, config.head_dim)
        table = torch.arange(2, dtype=torch.int32).numpy()
        slots = torch.arange(30)
        runs = slots[:, None] // 16 * config.num_layers * 2 + torch.arange(2)
        no_decode: DecodeRows | None = None
        batch = StepBatch(
            torch.tensor(tokens),
            slots,
            (runs * 16 + slots[:, None] % 16).reshape(-1),
            no_decode,
            (PrefillRow(0, 30, {None: plan_context(table, 0, 30, kv)}),),
            None,
        )
        with torch.inference_mode():
            outputs[rank] = LlamaModel(config, load(tmp_path, parallel), parallel).forward(
                CpuStepKernels(config, batch, kv)
            )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = logits_of(model, tokens)
    for rank in range(2):
        torch.testing.assert_close(outputs[rank], expected, rtol=1e-4, atol=2e-4)


def test_heads_that_cannot_be_dealt_out_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM")
    config = read_model_config(tmp_path)
    with pytest.raises(ConfigError, match="4 attention heads cannot be dealt out to 3 ranks"):
        LlamaModel(config, load(tmp_path), ParallelContext(0, 3))
