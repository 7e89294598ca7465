"""kill -9 a worker at each named moment: streams go on and end with the tokens they would have had.

The failpoint fires in the process that passes the moment; the victim is that process or its peer.
"""

from pathlib import Path

import pytest
from kills import MOMENTS, QUICK, check_moments


@pytest.mark.timeout(400)
async def test_streams_survive_a_kill_at_the_moments_that_matter_most(tmp_path: Path) -> None:
    await check_moments(tmp_path, sorted(QUICK), kv={"transport": "shm"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("transport", ["shm", "torch_distributed"])
async def test_streams_survive_a_kill_at_every_moment(tmp_path: Path, transport: str) -> None:
    await check_moments(tmp_path, list(MOMENTS), kv={"transport": transport})
