"""docs/gguf-tokenizers.md says what the code does."""

import re
from pathlib import Path

from paceline.engine.gguf.pre_tokenizers import PRE_TOKENIZERS, REFUSED_PRE_TOKENIZERS
from paceline.engine.gguf.tokenizer import TOKENIZER_MODELS
from paceline.engine.gguf.tokenizer_keys import TOKENIZER_KEYS

PAGE = Path(__file__).parents[3] / "docs" / "gguf-tokenizers.md"


def table(heading: str) -> list[list[str]]:
    """Return the cells of the rows of the first table below a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def code(cell: str) -> list[str]:
    return re.findall("`([^`]*)`", cell)


def test_the_page_lists_every_pre_tokenizer_with_its_rules() -> None:
    listed = {
        name: (status, words == "yes", bos == "yes")
        for names, status, _, words, bos in table("Pre-tokenizers")
        for name in code(names)
    }
    assert listed == {
        name: ("equal", pre_tokenizer.ignore_merges, pre_tokenizer.add_bos)
        for name, pre_tokenizer in PRE_TOKENIZERS.items()
    } | dict.fromkeys(REFUSED_PRE_TOKENIZERS, ("refused", False, False))


def test_the_page_gives_the_reason_of_each_refused_pre_tokenizer() -> None:
    reasons = {code(row[0])[0]: row[2] for row in table("Pre-tokenizers") if code(row[0])}
    assert {name: reasons[name] for name in REFUSED_PRE_TOKENIZERS} == dict(REFUSED_PRE_TOKENIZERS)


def test_the_page_lists_every_key_and_its_use() -> None:
    listed = {code(key)[0]: (use, why) for key, use, why in table("Keys")[:-1]}
    assert listed == {
        key: ("used" if use.used else "harmless", use.why) for key, use in TOKENIZER_KEYS.items()
    }


def test_the_page_lists_the_models() -> None:
    *models, others = table("Models")
    assert [code(model[0])[0] for model in models] == list(TOKENIZER_MODELS)
    assert others[1] == "refused"
