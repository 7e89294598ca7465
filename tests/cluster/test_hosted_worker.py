"""How a worker's process is set up from settings that all nodes share."""

import pytest

from paceline.cluster.hosted import HostContext
from paceline.cluster.hosted_worker import _kv_settings
from paceline.cluster.process_state import ProcessName, Role
from paceline.cluster.settings import DeploymentSettings


@pytest.mark.parametrize(
    ("listen_host", "expected"), [("0.0.0.0", "10.0.0.7"), ("127.0.0.1", "127.0.0.1")]
)
def test_any_address_becomes_the_nodes_own(listen_host: str, expected: str) -> None:
    settings = DeploymentSettings.model_validate(
        {"model": {"path": "x"}, "kv": {"listen_host": listen_host, "block_tokens": 32}}
    )
    context = HostContext(
        name=ProcessName(Role.DECODE, 0, 1),
        settings=settings,
        host="10.0.0.7",
        router_port=0,
        on_step=lambda name, seconds: None,
        on_progress=lambda what, share: None,
        on_failure=lambda error: None,
    )
    kv = _kv_settings(context)
    assert (kv.listen_host, kv.block_tokens) == (expected, 32)
