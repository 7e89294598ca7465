"""Run real steps before a worker is READY, so that no request pays for the first one."""

import numpy as np

from paceline.engine.step_plan import ModelRunner, SlotStart, StepPlan
from paceline.sampling_params import SamplingParams


def warm_up(runner: ModelRunner, block_tokens: int) -> None:
    """Prefill and decode one block's tokens in slot 0 and block 0, which are garbage afterwards.

    Called before anything is allocated. Raises what a step raises.
    """
    prompt = np.zeros(block_tokens - 1, dtype=np.int32)
    start = SlotStart(
        0, SamplingParams(temperature=0.0, max_tokens=2), 0, prompt, np.empty(0, np.int32)
    )
    prefill = StepPlan(
        step_id=0,
        slots=_int32(0),
        starts=_int32(0),
        num_new_tokens=_int32(len(prompt)),
        from_last_sample=np.array([False]),
        tokens=prompt,
        sample_positions=_int32(len(prompt) - 1),
        sample_slots=_int32(0),
        sample_indices=_int32(0),
        slot_starts=(start,),
        table_slots=_int32(0),
        table_columns=_int32(0),
        table_blocks=_int32(0),
    )
    decode = StepPlan(
        step_id=1,
        slots=_int32(0),
        starts=_int32(len(prompt)),
        num_new_tokens=_int32(1),
        from_last_sample=np.array([True]),
        tokens=np.empty(0, np.int32),
        sample_positions=_int32(0),
        sample_slots=_int32(0),
        sample_indices=_int32(1),
    )
    runner.launch(prefill).result()
    runner.launch(decode).result()


def _int32(value: int) -> "np.ndarray[tuple[int], np.dtype[np.int32]]":
    return np.array([value], dtype=np.int32)
