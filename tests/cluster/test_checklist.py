"""What a start looks like: a live view on a terminal, lines elsewhere."""

import io

from rich.console import Console

from paceline.cluster.actors import ProcessActor, ProcessSnapshot
from paceline.cluster.build_hosted import build_hosted
from paceline.cluster.cli.checklist import Checklist
from paceline.cluster.launcher import LoadProgress, StartupStep
from paceline.cluster.process_state import ProcessName, ProcessState, Role
from paceline.cluster.settings import DeploymentSettings

GPU_STEPS = (
    StartupStep("load weights (15.0 GB at 21.3 GB/s)", 0.7),
    StartupStep("compile kernels", 12.04),
    StartupStep("allocate the KV pool (64,123 blocks, 100.2 GiB)", 0.1),
    StartupStep("capture 12 CUDA graphs", 3.0),
)


def snapshot(
    state: ProcessState = ProcessState.STARTING,
    steps: tuple[StartupStep, ...] = (),
    loading: LoadProgress | None = None,
) -> ProcessSnapshot:
    return ProcessSnapshot("decode-0", state, steps, loading, "", 15.93)


def lines(*snapshots: ProcessSnapshot) -> str:
    """What is written where the output is no terminal."""
    console = Console(file=io.StringIO(), width=150, soft_wrap=True, highlight=False)
    with Checklist(console) as checklist:
        for each in snapshots:
            checklist.processes([each])
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def view(given: ProcessSnapshot, width: int = 80) -> str:
    """What a terminal shows."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    checklist = Checklist(console)
    checklist.ended("start Ray", 5.0)
    checklist.processes([given])
    console.print(checklist._render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_ready_process_is_one_line_with_each_step_and_its_time() -> None:
    ready = snapshot(ProcessState.READY, GPU_STEPS)
    assert lines(snapshot(), ready, ready) == (
        "  ✓ decode-0 15.9 s load weights (15.0 GB at 21.3 GB/s) 0.7 s · "
        "compile kernels 12.0 s · "
        "allocate the KV pool (64,123 blocks, 100.2 GiB) 0.1 s · capture 12 CUDA graphs 3.0 s\n"
    )


def test_names_of_steps_are_shown_as_they_are() -> None:
    step = StartupStep("outsiders: [dim] [/x]", 0.0)
    assert "outsiders: [dim] [/x] 0.0 s" in lines(snapshot(ProcessState.READY, (step,)))
    assert "outsiders: [dim] [/x] 0.0 s" in view(snapshot(steps=(step,)))


def test_a_long_step_shows_how_far_it_is() -> None:
    loading = LoadProgress("Loading weights, 21.3 GB/s", 0.25)
    shown = view(snapshot(steps=GPU_STEPS[:1], loading=loading))
    assert "Loading weights, 21.3 GB/s" in shown
    assert "25%" in shown


def test_many_steps_wrap_beside_the_name_on_a_narrow_terminal() -> None:
    shown = view(snapshot(ProcessState.READY, GPU_STEPS)).splitlines()
    assert shown[0].split() == ["✓", "start", "Ray", "5.0", "s"]
    assert shown[1].startswith("   ✓ decode-0 15.9 s load weights (15.0 GB at 21.3 GB/s) 0.7 s")
    assert all(len(line) <= 80 for line in shown)
    words = " ".join(" ".join(shown).split())
    assert all(step.name in words for step in GPU_STEPS)


async def test_progress_ends_with_its_step() -> None:
    settings = DeploymentSettings.model_validate({"model": {"path": "x"}})
    actor = ProcessActor(ProcessName(Role.DECODE, 0, 1), settings, build_hosted)
    actor._progressed("Loading weights, 21.3 GB/s", 0.999)
    assert (await actor.report()).loading == LoadProgress("Loading weights, 21.3 GB/s", 0.999)
    actor._stepped("load weights (15.0 GB at 21.3 GB/s)", 0.7)
    report = await actor.report()
    assert report.loading is None
    assert report.steps == GPU_STEPS[:1]
