"""Fail when a relative link in a Markdown file leads nowhere.

Links to other sites are not followed: `make docs` needs no network.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def broken_links(document: Path) -> list[str]:
    """List the relative link targets of `document` that name no file or folder."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    paths = (t.split("#")[0] for t in LINK.findall(text) if "://" not in t and "mailto:" not in t)
    return [p for p in paths if p and not (document.parent / p).exists()]


def main() -> int:
    """Check the documents at the root, under docs/ and in the folders' READMEs."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    failures = [
        f"{document.relative_to(ROOT)}: {link} does not exist"
        for document in sorted(set(documents))
        for link in broken_links(document)
    ]
    print("\n".join(failures) or f"{len(set(documents))} documents, all links lead somewhere")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
