"""`paceline demo`, as a new user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demonstration_runs_to_its_end_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the demonstration's model is a GGUF file")
    code = "from paceline.cluster.cli import main; main()"
    # Ray makes sockets in it, so it has to be short.
    runtime_folder = Path("/tmp") / f"pd-{os.getpid()}"
    result = subprocess.run(
        [sys.executable, "-c", code, "demo"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"PACELINE_RUNTIME_DIR": str(runtime_folder)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "gravity" in result.stdout.lower()
    assert "decode 2 of 2 ready" in result.stdout
    assert "nothing is left" in result.stdout
    assert not list(runtime_folder.glob("*"))
