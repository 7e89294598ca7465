"""Start deployments of `fake_hosted` processes on a real Ray."""

import os
from pathlib import Path

import fake_hosted

from paceline.cluster import lifecycle
from paceline.cluster.settings import DeploymentSettings

ROOT = Path(__file__).resolve().parents[2]


class SilentWatcher:
    """Watches a start-up without a word."""

    def began(self, step: str) -> None:
        """Nothing."""

    def ended(self, step: str, seconds: float) -> None:
        """Nothing."""

    def processes(self, snapshots: object) -> None:
        """Nothing."""


def make_settings(orders: Path, **parts: object) -> DeploymentSettings:
    tree: dict[str, object] = {
        "deployment": "test",
        "model": {"path": str(orders)},
        "router": {"grpc_port": 0},
        "prefill": {"kv_cache_bytes": 1 << 20},
        "decode": {"kv_cache_bytes": 1 << 20},
        "controller": {
            "poll_interval_s": 0.1,
            "drain_timeout_s": 5.0,
            "worker_silence_limit_s": 3.0,
        },
    }
    return DeploymentSettings.model_validate(tree | parts)


def start(settings: DeploymentSettings) -> lifecycle.Deployment:
    """Start a deployment of fakes, from the repository's root as a user would."""
    import ray

    ray.cloudpickle.register_pickle_by_value(fake_hosted)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        return lifecycle.up(
            settings, "test.yaml", SilentWatcher(), fake_hosted.build_fake, check=lambda found: None
        )
    finally:
        os.chdir(before)
