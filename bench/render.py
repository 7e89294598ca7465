"""Put results of the GPU's benchmarks into docs/performance.md: `python -m paceline.bench.render`.

Reads engine_*.json, kernels_*.json and compare_*.json of a folder and replaces what lies between
marks such as `<!-- begin decode -->` and `<!-- end decode -->`; draws docs/roofline.svg.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from paceline.bench.compare_table import compare_section
from paceline.bench.gpu_rates import Rates
from paceline.bench.gpu_tables import (
    Document,
    busy_section,
    decode_section,
    kernels_section,
    memory_section,
    point_name,
    prefill_section,
    read_documents,
    sampling_section,
    start_up_section,
    tokens_text,
)
from paceline.bench.operation_tables import operations_section
from paceline.bench.roofline import Measured, draw_roofline
from paceline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def fill(page: str, name: str, content: str) -> str:
    """Replace what lies between a section's marks. Raises ConfigError if they are not there."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise ConfigError(f"The page has no {begin} followed by {end}. Put them where it belongs.")
    middle = f"\n{content}\n" if content else "\n"
    return pattern.sub(lambda match: f"{begin}\n{middle}\n{end}", page)


def roofline(document: Document) -> str:
    """Draw the decode steps and prompts of one result."""
    result = document.result
    points = [
        Measured(
            "decode", point_name(point), found["bytes"], found["flops"], found["step_ms"] / 1e3
        )
        for point, found in result["decode"].items()
    ]
    points += [
        Measured(
            "prefill",
            f"prompt of {tokens_text(int(count))}",
            found["bytes"],
            found["flops"],
            found["ms"] / 1e3,
        )
        for count, found in result["prefill"].items()
    ]
    title = f"{document.config['model']}, {result['gpu']}: decode steps and prompts"
    return draw_roofline(title, Rates(**result["rates"]), points)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--roofline", type=Path, default=ROOT / "docs" / "roofline.svg")
    parser.add_argument("--roofline-model", default="llama-3-8b")
    options = parser.parse_args(arguments)
    engines = read_documents(options.results, "engine")
    sections = {
        "decode": decode_section(engines),
        "sampling": sampling_section(engines),
        "prefill": prefill_section(engines),
        "kernels": kernels_section(engines),
        "busy": busy_section(engines),
        "start-up": start_up_section(engines),
        "memory": memory_section(engines),
        "compare": compare_section(read_documents(options.results, "compare")),
        "operations": "\n\n".join(
            operations_section(document) for document in read_documents(options.results, "kernels")
        ),
    }
    sections["roofline"] = ""
    for document in engines:
        if document.config["model"] == options.roofline_model and document.result["rates"]:
            options.roofline.write_text(roofline(document), encoding="utf-8")
            sections["roofline"] = f"![steps under the roofs of the GPU]({options.roofline.name})"
    page = options.page.read_text(encoding="utf-8")
    for name, content in sections.items():
        page = fill(page, name, content)
    options.page.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
