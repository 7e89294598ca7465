"""What `paceline status` prints of each process."""

import pytest

from paceline.cluster.cli.operate import print_status
from paceline.v1 import control_pb2 as pb


def test_the_status_shows_how_late_each_router_is(capsys: pytest.CaptureFixture[str]) -> None:
    processes = [
        pb.Process(worker_id="router-0", role="router", lag_s=0.012, max_lag_s=0.345),
        pb.Process(worker_id="decode-0", role="decode"),
    ]
    print_status(pb.GetStatusResponse(deployment="d", processes=processes), 0)
    output = capsys.readouterr().out
    [router] = [line for line in output.splitlines() if "router-0" in line]
    [decode] = [line for line in output.splitlines() if "decode-0" in line]
    assert "12 ms" in router
    assert "345 ms" in router
    assert " ms" not in decode
