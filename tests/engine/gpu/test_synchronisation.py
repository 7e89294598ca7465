"""No step waits for the device while it is launched: PyTorch raises where one would."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_references import write_model
from runner_driver import Row, RunnerDriver
from triton_device import device

from paceline.engine.gpu.model_runner import GpuModelRunner
from paceline.engine.step_plan import StepHandle, StepPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(device() != "cuda", reason="needs a CUDA device"),
]


class StrictRunner:
    """Launches with every synchronising call forbidden."""

    def __init__(self, runner: GpuModelRunner) -> None:
        self.max_num_slots = runner.max_num_slots
        self._runner = runner

    def launch(self, plan: StepPlan) -> StepHandle:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return self._runner.launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def close(self) -> None:
        self._runner.close()


@pytest.fixture(params=[False, True])
def driver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RunnerDriver]:
    write_model(tmp_path, "LlamaForCausalLM", num_hidden_layers=2)
    driver = RunnerDriver(tmp_path, kind="gpu", num_slots=6, pads_prompts=request.param)
    assert isinstance(driver.runner, GpuModelRunner)
    driver.model.forward = driver.model.model.forward  # type: ignore[method-assign]
    driver.model.logits = [torch.empty(6, 0)]  # nobody copies them to the CPU here
    driver.runner.capture_graphs()
    driver.runner = StrictRunner(driver.runner)
    yield driver
    driver.runner.close()


def test_steps_of_every_kind_are_launched_without_waiting(driver: RunnerDriver) -> None:
    for slot in range(4):
        driver.start(slot)
    steps = (
        [Row(0, list(range(70))), Row(1, [5, 6])],
        [Row(0, None), Row(1, None), Row(2, list(range(20)))],
        [Row(slot, None) for slot in range(3)],
        [Row(2, None), Row(3, [7])],
    )
    results = [driver.step(*rows)[0] for rows in steps]
    driver.copy_block(0, 1)
    results.append(driver.step(Row(0, None), Row(1, None))[0])
    assert [len(result.token_ids) for result in results] == [2, 3, 3, 2, 2]


def test_the_check_above_would_see_a_wait() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(3, device="cuda").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
