"""Adjust a Ray head that paceline starts; Ray calls `adjust` because RAY_START_HOOK names it.

`ray start` has no option for either of these. Without them it works all the same, with 200 MB more
memory and three seconds later.
"""

from typing import Any


def adjust(ray_params: Any, is_head: bool) -> None:
    """Start neither the Ray client's server nor the dashboard's process: nobody uses them here."""
    from ray._private import services

    ray_params.ray_client_server_port = None
    if hasattr(services, "start_api_server"):
        services.start_api_server = lambda *args, **kwargs: (None, None)
