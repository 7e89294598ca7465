"""The commands of `paceline` and their options."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from paceline.sampling_params import MAX_TOKENS

app = typer.Typer(
    name="paceline",
    help="Serve large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config = typer.Typer(help="Look at settings.", no_args_is_help=True)
app.add_typer(config, name="config")

File: TypeAlias = Annotated[
    Path | None, typer.Argument(help="Settings in YAML. Default: one small model on this machine.")
]
Overrides: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting that beats the file; repeatable."),
]
DeploymentName: TypeAlias = Annotated[
    str | None, typer.Option("--deployment", help="Its name; not needed when only one is up.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxTokens: TypeAlias = Annotated[
    int, typer.Option(min=1, max=MAX_TOKENS, help="Output tokens at most.")
]
Temperature: TypeAlias = Annotated[float, typer.Option(min=0, max=100, help="0 is greedy.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("paceline"))
        raise typer.Exit


@app.command()
def up(file: File = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Start a deployment, and return when it can serve."""
    from paceline.cluster.cli import deploy

    deploy.up(file, overrides or [], as_json)


@app.command()
def serve(file: File = None, overrides: Overrides = None) -> None:
    """Start a deployment, show what happens, and end it by Ctrl-C or SIGTERM."""
    from paceline.cluster.cli import deploy

    deploy.serve(file, overrides or [])


@app.command()
def down(deployment: DeploymentName = None, as_json: Json = False) -> None:
    """End a deployment and leave nothing behind. Running streams get router.drain_timeout_s."""
    from paceline.cluster.cli import deploy

    deploy.down(deployment, as_json)


@app.command()
def status(
    deployment: DeploymentName = None,
    events: Annotated[int, typer.Option(min=0, help="Last events to show.")] = 5,
    as_json: Json = False,
) -> None:
    """Show every process, the pools, and what happened last."""
    from paceline.cluster.cli import operate

    operate.status(deployment, events, as_json)


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="POOL=SIZE...", help="Such as decode=3.")],
    deployment: DeploymentName = None,
    wait: Annotated[bool, typer.Option(help="Return when the pools have their new sizes.")] = True,
    as_json: Json = False,
) -> None:
    """Change the number of workers; requests in flight are not disturbed."""
    from paceline.cluster.cli import operate

    operate.scale(sizes, deployment, wait, as_json)


@app.command()
def drain(
    worker_id: Annotated[str, typer.Argument(help="Such as decode-1.")],
    deployment: DeploymentName = None,
) -> None:
    """Let one worker finish what it runs and end; it is not replaced."""
    from paceline.cluster.cli import operate

    operate.drain(worker_id, deployment)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Share of probability kept.")] = 1.0,
    top_k: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Most likely tokens kept; 0: all.")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**64 - 1, help="Makes sampling repeatable.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends the output; repeatable.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a message, by the model's template.")
    ] = False,
    deployment: DeploymentName = None,
    as_json: Json = False,
) -> None:
    """Stream a model's output for one prompt."""
    from paceline.cluster.cli import talk

    sampling = talk.Sampling(max_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))
    talk.generate(prompt, sampling, chat, deployment, as_json)


@app.command()
def chat(
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    system: Annotated[str, typer.Option(help="The system message.")] = "",
    deployment: DeploymentName = None,
) -> None:
    """Talk with the model; an empty line, /exit or Ctrl-D ends it, /new starts afresh.

    Ctrl-C stops an answer.
    """
    from paceline.cluster.cli import talk

    talk.chat(talk.Sampling(max_tokens, temperature), system, deployment)


@config.command()
def show(
    file: File = None,
    overrides: Overrides = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not a default.")] = False,
    as_json: Json = False,
) -> None:
    """Show every setting with the place it comes from."""
    from paceline.cluster.cli import configuration

    configuration.show(file, overrides or [], changed, as_json)


@app.command()
def check(file: File = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Tell what this machine can do, and whether the settings fit it. Starts nothing."""
    from paceline.cluster.cli import machine

    machine.check(file, overrides or [], as_json)


@app.command()
def demo(
    overrides: Overrides = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests while decode is scaled.")] = 6,
) -> None:
    """Serve a small model here, scale it under load, show where time goes, and end it."""
    from paceline.cluster.cli import demonstration

    demonstration.demo(overrides or [], requests)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context, deployment: DeploymentName = None) -> None:
    """Measure a running deployment: paceline bench --help lists the loads."""
    from paceline.cluster.cli import operate

    operate.bench(list(context.args), deployment)
