"""Every internal channel and server has the options of `paceline.grpc_options`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROCESSES = ["cluster", "decode_worker", "kv_transfer", "prefill_worker", "router", "worker"]
OPTIONS = {
    "insecure_channel": ["INTERNAL_CHANNEL"],
    "server": ["a server of paceline.grpc_server.make_server"],
}


def calls_of_grpc(source: str) -> list[tuple[str, int, str]]:
    """Give (function, line, its options) of each channel and server that is made."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        function = ast.unparse(call.func)
        name = function.rpartition(".")[2]
        if not function.startswith("grpc.") or name not in OPTIONS:
            continue
        options = [word.value for word in call.keywords if word.arg == "options"]
        given = "none"
        if options and isinstance(options[0], ast.Call):
            given = f"{ast.unparse(options[0].func)}(...)"
        elif options:
            given = ast.unparse(options[0])
        found.append((name, call.lineno, given))
    return found


@pytest.mark.parametrize("folder", PROCESSES)
def test_internal_channels_and_servers_take_the_shared_options(folder: str) -> None:
    # The command line's channels are those of a client.
    paths = [p for p in (ROOT / folder).rglob("*.py") if "cli" not in p.parts]
    for path in paths:
        for name, line, options in calls_of_grpc(path.read_text()):
            assert options in OPTIONS[name], f"{path.name}:{line}: {name} has {options}"


def test_channels_of_clients_skip_a_proxy() -> None:
    for path in (*(ROOT / "cluster" / "cli").glob("*.py"), ROOT / "bench" / "client.py"):
        for name, line, options in calls_of_grpc(path.read_text()):
            if name == "insecure_channel":
                assert options == "CLIENT_CHANNEL", f"{path.name}:{line}: it has {options}"


def test_a_channel_without_the_shared_options_is_found() -> None:
    assert calls_of_grpc("grpc.aio.insecure_channel(a)") == [("insecure_channel", 1, "none")]
