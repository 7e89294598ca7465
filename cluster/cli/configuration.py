"""`paceline config show`."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from paceline.cluster.cli.output import out, print_json, print_note
from paceline.cluster.settings_file import DEFAULT_FILE, Source, load_settings
from paceline.engine.gguf.reader import read_gguf
from paceline.engine.gguf.tokenizer import end_token_ids
from paceline.engine.model_config import read_model_config
from paceline.engine.model_source import find_model
from paceline.errors import ConfigError
from paceline.model_files.end_tokens import EndToken

END_TOKEN = "end token"
"""Of the model, shown among the settings."""


def show(file: Path | None, overrides: list[str], only_changed: bool, as_json: bool) -> None:
    loaded = load_settings(file or DEFAULT_FILE, overrides)
    entries = loaded.changed() if only_changed else loaded.explain()
    ends = _end_tokens(loaded.settings.model.path)
    if as_json:
        settings = [
            {
                "key": entry.key,
                "value": entry.value,
                "source": entry.origin.source.value,
                "where": entry.origin.where,
            }
            for entry in entries
        ]
        tokens = [
            {
                "key": END_TOKEN,
                "value": token.token_id,
                "source": "model",
                "where": ", ".join(token.files),
            }
            for token in ends
        ]
        print_json(settings + tokens)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("setting", "value", "from"):
        table.add_column(name)
    for entry in entries:
        is_default = entry.origin.source is Source.DEFAULT
        table.add_row(
            entry.key,
            Text("–" if entry.value is None else str(entry.value), "" if is_default else "bold"),
            Text(entry.origin.where or "default", "dim" if is_default else "cyan"),
        )
    for token in ends:
        table.add_row(END_TOKEN, str(token.token_id), Text(", ".join(token.files), "dim"))
    out.print(table)


def _end_tokens(model_path: str) -> tuple[EndToken, ...]:
    """Read the tokens that end sequences, if the model can be read."""
    try:
        path = find_model(model_path)
        if path.is_dir():
            return read_model_config(path).end_tokens
        ends = end_token_ids(read_gguf(path).metadata)
        return tuple(EndToken(token_id, (path.name,)) for token_id in ends)
    except ConfigError as error:
        print_note(f"The model's end tokens are not known: {error}")
    return ()
