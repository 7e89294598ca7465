"""`paceline config show`."""

from pathlib import Path

from rich.table import Table
from rich.text import Text

from paceline.cluster.cli.output import out, print_json
from paceline.cluster.settings_file import DEFAULT_FILE, Source, load_settings


def show(file: Path | None, overrides: list[str], only_changed: bool, as_json: bool) -> None:
    loaded = load_settings(file or DEFAULT_FILE, overrides)
    entries = loaded.changed() if only_changed else loaded.explain()
    if as_json:
        print_json(
            [
                {
                    "key": entry.key,
                    "value": entry.value,
                    "source": entry.origin.source.value,
                    "where": entry.origin.where,
                }
                for entry in entries
            ]
        )
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
    out.print(table)
