"""Requests of every kind of sampling, whose tokens follow from the request alone."""

from random import Random

from paceline.bench.faults.deployment import VOCAB_SIZE
from paceline.v1 import inference_pb2 as pb

FIRST_PLAIN_TOKEN = 3
MAX_PROMPT_TOKENS = 600
MIN_OUTPUT_TOKENS = 150
MAX_OUTPUT_TOKENS = 900


def make_requests(count: int, seed: int) -> list[pb.GenerateRequest]:
    """Make requests in turn of each kind: greedy, sampled, with penalties, several choices,
    log-probabilities, a first token that is the last."""
    random = Random(seed)
    return [
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=_prompt(random)), sampling=_sampling(number, random)
        )
        for number in range(count)
    ]


def _prompt(random: Random) -> list[int]:
    length = random.randint(1, MAX_PROMPT_TOKENS)
    return [random.randrange(FIRST_PLAIN_TOKEN, VOCAB_SIZE) for _ in range(length)]


def _sampling(number: int, random: Random) -> pb.SamplingParams:
    length = random.randint(MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS)
    sampling = pb.SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.0)
    match number % 6:
        case 1:
            sampling.temperature, sampling.top_p, sampling.seed = 0.8, 0.95, random.getrandbits(63)
        case 2:
            sampling.temperature, sampling.top_k, sampling.seed = 1.2, 40, random.getrandbits(63)
            sampling.repetition_penalty, sampling.presence_penalty = 1.2, 0.3
        case 3:
            sampling.temperature, sampling.n, sampling.seed = 1.0, 3, random.getrandbits(63)
        case 4:
            sampling.logprobs = 2
            sampling.logit_bias[FIRST_PLAIN_TOKEN] = 1.5
        case 5 if random.random() < 0.5:
            sampling.max_tokens = 1
    return sampling
