"""`paceline status`, `scale`, `drain` and `bench`."""

import time

from rich.table import Table
from rich.text import Text

from paceline.cluster.cli.clients import (
    CALL_TIMEOUT_S,
    Control,
    control,
    router_address,
    translated,
)
from paceline.cluster.cli.output import gib, out, print_json, print_note
from paceline.errors import ConfigError, FieldViolation, InvalidRequestError, UnavailableError
from paceline.v1 import control_pb2

SCALE_TIMEOUT_S = 900.0
SCALE_POLL_S = 0.2
MAX_SIZE_DIGITS = 9
"""What the protocol's 32 bits hold; the controller has a lower limit, which it names."""
_STATES = {
    control_pb2.PROCESS_STATE_STARTING: ("starting", "yellow"),
    control_pb2.PROCESS_STATE_READY: ("ready", "green"),
    control_pb2.PROCESS_STATE_DRAINING: ("draining", "yellow"),
    control_pb2.PROCESS_STATE_DEAD: ("dead", "red"),
}


def status(deployment: str | None, num_events: int, as_json: bool) -> None:
    with control(deployment) as api:
        response = api.status()
    if as_json:
        print_json(status_document(response))
    else:
        print_status(response, num_events)


def scale(sizes: list[str], deployment: str | None, wait: bool, as_json: bool) -> None:
    parsed = [_parse_size(size) for size in sizes]
    pools = dict(parsed)
    if len(pools) < len(parsed):
        raise ConfigError(f"{' '.join(sizes)} names a pool twice. Give each pool one size")
    started = time.monotonic()
    with control(deployment) as api:
        with translated("the controller"):
            response = api.stub.Scale(control_pb2.ScaleRequest(pools=pools), timeout=CALL_TIMEOUT_S)
        final = _wait_for_sizes(api) if wait else response.pools
    seconds = time.monotonic() - started
    if as_json:
        print_json({"seconds": round(seconds, 2), "pools": [_pool_document(p) for p in final]})
    else:
        words = ", ".join(f"{p.name} {p.ready} of {p.wanted} ready" for p in final)
        out.print(f"{words}, after {seconds:.1f} s")


def drain(worker_id: str, deployment: str | None) -> None:
    with control(deployment) as api, translated("the controller"):
        api.stub.Drain(control_pb2.DrainRequest(worker_id=worker_id), timeout=CALL_TIMEOUT_S)
    out.print(f"{worker_id} drains: it finishes what it runs and ends")


def bench(arguments: list[str], deployment: str | None) -> None:
    """Hand over to the load generator, aimed at the deployment unless told otherwise."""
    import typer

    from paceline.bench.cli import bench as run_bench

    wants_help = bool({"-h", "--help"} & set(arguments))
    names_address = any(a == "--address" or a.startswith("--address=") for a in arguments)
    if not wants_help and not names_address:
        arguments = [*arguments, "--address", router_address(deployment)]
    command = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    command.command()(run_bench)
    command(args=arguments, prog_name="paceline bench")


def print_status(response: control_pb2.GetStatusResponse, num_events: int) -> None:
    """Print a table of processes, the pools' sizes, and the last events."""
    pools = ", ".join(f"{p.name} {p.ready} of {p.wanted} ready" for p in response.pools)
    out.print(
        Text(response.deployment, "bold")
        + Text(f" · {response.model or 'no model yet'} · {pools} · up {response.uptime_s:.0f} s")
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "process",
        "state",
        "address",
        "device",
        "pid",
        "memory",
        "blocks free",
        "running",
        "waiting",
        "lag",
        "max lag",
    ):
        right = name not in ("process", "state", "address", "device")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    table.add_column("")
    for process in response.processes:
        state, style = _STATES.get(process.state, ("unknown", "red"))
        blocks = f"{process.num_free_blocks}/{process.num_blocks}" if process.num_blocks else ""
        table.add_row(
            process.worker_id,
            Text(state, style),
            process.address,
            process.device,
            str(process.pid or ""),
            gib(process.memory_bytes) if process.memory_bytes else "",
            blocks,
            str(process.num_running),
            str(process.num_waiting) if process.role == "router" else "",
            *(
                f"{lag_s * 1e3:.0f} ms" if process.role == "router" else ""
                for lag_s in (process.lag_s, process.max_lag_s)
            ),
            Text(
                process.message, "red" if process.state == control_pb2.PROCESS_STATE_DEAD else "dim"
            ),
        )
    out.print(table)
    for event in list(response.events)[-num_events:] if num_events else []:
        clock = time.strftime("%H:%M:%S", time.localtime(event.time_s))
        print_note(f"{clock}  {event.message}")


def status_document(response: control_pb2.GetStatusResponse) -> object:
    """Return the status as JSON values, with the proto's names."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(
        response, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _parse_size(text: str) -> tuple[str, int]:
    pool, equals, size = text.partition("=")
    if not equals or not pool:
        raise ConfigError(f"{text} must read POOL=SIZE, such as decode=3")
    if not size.isdecimal() or len(size) > MAX_SIZE_DIGITS:
        raise InvalidRequestError(
            FieldViolation(
                f"pools[{pool}]",
                f"is {size or 'empty'}; it must be a whole number from 0, of {MAX_SIZE_DIGITS} "
                "digits at most",
            )
        )
    return pool, int(size)


def _pool_document(pool: control_pb2.Pool) -> dict[str, object]:
    return {"name": pool.name, "wanted": pool.wanted, "ready": pool.ready}


def _wait_for_sizes(api: Control) -> "list[control_pb2.Pool]":
    deadline = time.monotonic() + SCALE_TIMEOUT_S
    while True:
        response = api.status()
        roles = [p.role for p in response.processes]
        if all(p.ready == p.wanted == roles.count(p.name) for p in response.pools):
            return list(response.pools)
        for process in response.processes:
            if process.state != control_pb2.PROCESS_STATE_READY and process.message:
                print_note(f"{process.worker_id}: {process.message}")
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"the pools do not have their sizes after {SCALE_TIMEOUT_S:g} s; see paceline "
                "status"
            )
        time.sleep(SCALE_POLL_S)
