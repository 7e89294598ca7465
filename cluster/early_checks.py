"""What the settings' machine can tell before Ray starts: the model's folder, its limits, the ports.

`paceline check` shows it, `up` refuses by it. Nothing here imports torch or Ray.
"""

import socket
from collections.abc import Callable, Iterator
from typing import NamedTuple

from paceline.cluster.settings import DeploymentSettings
from paceline.engine.model_facts import (
    ModelFacts,
    choose_dtype,
    choose_model_len,
    read_model_facts,
)
from paceline.errors import ConfigError, PacelineError
from paceline.router.tokenize import PromptTokenizer


class EarlyFinding(NamedTuple):
    """One thing that was looked at."""

    name: str
    value: str
    """What was found; empty if there is a problem."""
    problem: str = ""
    """Why the processes cannot start, with numbers and the setting to change."""


def early_findings(settings: DeploymentSettings) -> list[EarlyFinding]:
    """Look at everything, also after the first problem."""
    return [*_model(settings), *_ports(settings)]


def refuse_early(settings: DeploymentSettings) -> None:
    """Raise ConfigError with every problem.

    With ray.address, processes may run on other machines than this one: they refuse themselves.
    """
    if settings.ray.address is not None:
        return
    problems = [finding.problem for finding in early_findings(settings) if finding.problem]
    if problems:
        raise ConfigError("\n".join(problems))


def _model(settings: DeploymentSettings) -> Iterator[EarlyFinding]:
    model = settings.model
    try:
        facts = read_model_facts(model)
    except PacelineError as error:
        yield EarlyFinding("model", "", str(error))
        return
    yield EarlyFinding("model", f"{facts.architecture} in {facts.path}")
    limit = facts.max_position_embeddings
    yield _looked_at(
        "max_model_len", lambda: f"{choose_model_len(model, limit, facts.path):,} of {limit:,}"
    )
    device = settings.decode.device  # settings with pools on unlike devices are refused
    yield _looked_at("dtype", lambda: choose_dtype(model, facts.dtype, device))
    yield _looked_at("tokenizer", lambda: _tokenizer(facts))


def _tokenizer(facts: ModelFacts) -> str:
    if facts.path.is_file():
        return f"inside {facts.path.name}"
    tokenizer = PromptTokenizer.from_folder(facts.path)
    template = "with a chat template" if tokenizer.has_chat_template else "without a chat template"
    return f"tokenizer.json, {template}"


def _ports(settings: DeploymentSettings) -> Iterator[EarlyFinding]:
    for name, part in (("router", settings.router), ("controller", settings.controller)):
        yield check_port(f"{name}.grpc_port", part.host, part.grpc_port)


def check_port(key: str, host: str, port: int) -> EarlyFinding:
    """Say whether a server could listen there now."""
    if port == 0:
        return EarlyFinding(key, "0: takes a free one")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        section = key.partition(".")[0]
        problem = f"{section}.host is {host!r}, which is no address here ({error.strerror})"
        return EarlyFinding(key, "", problem)
    except OSError as error:
        return EarlyFinding(
            key,
            "",
            f"port {port} on {host} is not free ({error.strerror}), and {key} is {port}. Stop "
            f"what uses it, or change {key}: 0 takes a free one",
        )
    return EarlyFinding(key, f"port {port} on {host} is free")


def _looked_at(name: str, look: Callable[[], str]) -> EarlyFinding:
    try:
        return EarlyFinding(name, look())
    except PacelineError as error:
        return EarlyFinding(name, "", str(error))
