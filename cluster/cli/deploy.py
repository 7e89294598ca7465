"""`paceline up`, `serve` and `down`."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from paceline.cluster import lifecycle, signals
from paceline.cluster.cli.checklist import Checklist
from paceline.cluster.cli.clients import control, router_address
from paceline.cluster.cli.output import err, out, print_json, print_note
from paceline.cluster.settings_file import DEFAULT_FILE, LoadedSettings, load_settings
from paceline.errors import UnavailableError

EVENT_POLL_S = 1.0
MAX_SILENCE_S = 60.0


def up(file: Path | None, overrides: list[str], as_json: bool) -> None:
    loaded = load_settings(file or DEFAULT_FILE, overrides)
    deployment = start(loaded, file or DEFAULT_FILE)
    name = deployment.record.deployment
    address = router_address(name)
    if as_json:
        print_json(
            {
                "deployment": name,
                "seconds": round(deployment.seconds, 2),
                "router_address": address,
                "controller_address": deployment.record.controller_address,
                "ray_address": deployment.record.ray_address,
            }
        )
    else:
        out.print(
            Text(f"{name} serves at {address} (gRPC), after {deployment.seconds:.1f} s.\n", "bold")
            + Text('Try: paceline generate "The capital of France is"   End it: paceline down')
        )


def serve(file: Path | None, overrides: list[str]) -> None:
    loaded = load_settings(file or DEFAULT_FILE, overrides)
    with running(loaded, file or DEFAULT_FILE) as deployment:
        name = deployment.record.deployment
        with contextlib.suppress(signals.Ended):  # the way to end it, so the exit status is 0
            out.print(
                f"{name} serves at {router_address(name)} (gRPC), after {deployment.seconds:.1f} "
                "s. Ctrl-C ends it."
            )
            _show_events(name)
        print_note("ending …")


def down(deployment: str | None, as_json: bool) -> None:
    started = time.monotonic()
    record = lifecycle.down(deployment)
    seconds = round(time.monotonic() - started, 2)
    if as_json:
        print_json({"deployment": record.deployment, "seconds": seconds})
    else:
        out.print(f"{record.deployment} has ended after {seconds:.1f} s; nothing of it is left.")


def start(loaded: LoadedSettings, file: Path) -> lifecycle.Deployment:
    """Start a deployment with a checklist on stderr."""
    changed = [f"{s.key}={s.value}" for s in loaded.changed()]
    print_note(f"{file}: {', '.join(changed) or 'defaults only'}")
    with Checklist(err) as checklist:
        return lifecycle.up(loaded.settings, str(file), checklist)


@contextlib.contextmanager
def running(loaded: LoadedSettings, file: Path) -> Iterator[lifecycle.Deployment]:
    """Start a deployment for the block, and end it however the block ends."""
    try:
        yield start(loaded, file)
    finally:
        lifecycle.end_own(loaded.settings.deployment)


def _show_events(name: str) -> None:
    shown_s = time.time()
    heard_s = time.monotonic()
    while True:
        time.sleep(EVENT_POLL_S)
        try:
            with control(name) as api:
                events = api.status().events
        except UnavailableError:
            # Ray starts a dead controller again; serving goes on meanwhile.
            if time.monotonic() - heard_s > MAX_SILENCE_S:
                raise
            continue
        heard_s = time.monotonic()
        for event in events:
            if event.time_s > shown_s:
                shown_s = event.time_s
                clock = time.strftime("%H:%M:%S", time.localtime(event.time_s))
                out.print(Text(f"{clock}  {event.message}"))
