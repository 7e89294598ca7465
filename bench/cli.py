"""`paceline bench`: drive a running deployment over gRPC."""

import asyncio
import json
import secrets
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from paceline.bench.chosen_load import ChosenLoad, LoadKind
from paceline.bench.environment import write_result
from paceline.bench.load import TRACES, PlannedRequest
from paceline.bench.page import write_page
from paceline.bench.prefix_sharing import cache_warning, num_shared_tokens
from paceline.bench.record import Limits, summarize
from paceline.bench.report import result_document, summary_table
from paceline.errors import ConfigError

DEFAULT_TRACE = TRACES["azure-conversation"]
SEED_BITS = 32


USED_BY = {
    "concurrency": (LoadKind.CLOSED,),
    "rate": (LoadKind.OPEN,),
    "input_tokens": (LoadKind.CLOSED, LoadKind.OPEN),
    "trace": (LoadKind.TRACE,),
    "speed": (LoadKind.TRACE,),
    "max_input_tokens": (LoadKind.TRACE,),
}
"""Options that not every kind of load uses."""


def bench(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="host:port of a router.")] = "127.0.0.1:50051",
    load: Annotated[
        LoadKind,
        typer.Option(help="closed: N users; open: Poisson arrivals; trace: replay a file."),
    ] = LoadKind.CLOSED,
    requests: Annotated[int, typer.Option(min=1, help="Requests to send.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Users of a closed loop.")] = 16,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second, open loop.")] = 1.0,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an output.")] = 128,
    trace: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, readable=True, help="A file, see bench/traces."),
    ] = DEFAULT_TRACE,
    speed: Annotated[float, typer.Option(min=0.001, help="Replay so many times faster.")] = 1.0,
    max_input_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cut a trace's prompts; default: the model's length.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Repeats the prompts and arrivals of a run; default: new ones."),
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="For one request.")] = 600.0,
    max_ttft_ms: Annotated[float | None, typer.Option(help="Goodput's limit.")] = None,
    max_tpot_ms: Annotated[float | None, typer.Option(help="Goodput's limit.")] = None,
    max_e2e_ms: Annotated[float | None, typer.Option(help="Goodput's limit.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    page: Annotated[Path | None, typer.Option(help="Draw the result as HTML.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
) -> None:
    """Send a load to a running deployment and report TTFT, TPOT, ITL, end-to-end and goodput."""
    # With the same prompts again, a second run would measure the prefix cache.
    seed = secrets.randbits(SEED_BITS) if seed is None else seed
    unused = [name for name, kinds in USED_BY.items() if load not in kinds]
    config = {
        name: value.value if isinstance(value, Enum) else str(value) if name == "trace" else value
        for name, value in locals().items()
        if name not in ("context", "output", "page", "as_json", "unused", *unused)
    }
    _refuse_given(unused, context, load)
    for path in (output, page):
        _refuse_unwritable(path)
    limits = Limits(_seconds(max_ttft_ms), _seconds(max_tpot_ms), _seconds(max_e2e_ms))
    chosen = ChosenLoad(
        kind=load,
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        trace=trace,
        speed=speed,
        max_input_tokens=max_input_tokens,
        seed=seed,
    )
    sent = asyncio.run(chosen.send(address, timeout_s))
    num_shared = num_shared_tokens(request.prompt for request in sent.planned)
    summary = summarize(sent.records, limits, num_shared_tokens=num_shared)
    title = f"paceline bench: {load.value} loop at {address}, seed {seed}"
    document: dict[str, Any] = result_document(summary, limits, sent.records)
    if output is not None:
        write_result(output, "load", config, document)
    if page is not None:
        write_page(page, title, summary, sent.records)
    if as_json:
        typer.echo(json.dumps({"config": config, **document}))
    else:
        Console(markup=False).print(summary_table(summary, title))
    _warn([cut_warning(sent.planned), cache_warning(summary)], document["errors"])
    if summary.num_failed:
        raise typer.Exit(1)


def _warn(warnings: Iterable[str | None], errors: Iterable[str]) -> None:
    for warning in warnings:
        if warning is not None:
            typer.echo(f"warning: {warning}", err=True)
    for error in sorted(set(errors)):
        typer.echo(f"failed: {error}", err=True)


def cut_warning(planned: Sequence[PlannedRequest]) -> str | None:
    """Say so when requests are shorter than in their trace."""
    num_cut = sum(request.is_cut for request in planned)
    if not num_cut:
        return None
    return (
        f"{num_cut} of {len(planned)} requests are longer in the trace and were cut to "
        "--max-input-tokens (at most the model's length) and --output-tokens"
    )


def _refuse_unwritable(path: Path | None) -> None:
    """Raise ConfigError now, and not once a load has run whose result cannot be kept."""
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}. Name another file"
        ) from None


def _refuse_given(unused: Sequence[str], context: typer.Context, load: LoadKind) -> None:
    """Raise ConfigError for options on the command line that change nothing."""
    for name in unused:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            kinds = " or ".join(f"--load {kind.value}" for kind in USED_BY[name])
            raise ConfigError(
                f"--{name.replace('_', '-')} changes nothing in a load that is {load.value}: it "
                f"belongs to {kinds}. Leave it out, or choose that load"
            )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
