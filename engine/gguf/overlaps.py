"""Special tokens that llama.cpp and `tokenizers` can find differently in a text.

llama.cpp looks for the longest token first, anywhere; `tokenizers` for the first token, and for the
longest that begins there. They differ where the end of a token begins another one that is as long
or longer, unless both are runs of one character.
"""

from collections import defaultdict
from collections.abc import Collection

from paceline.engine.gguf.metadata import short
from paceline.errors import UnsupportedModelError


def check_overlaps(texts: Collection[str]) -> None:
    """Raise UnsupportedModelError naming two of these special tokens that can overlap."""
    by_first = defaultdict(list)
    for text in texts:
        by_first[text[0]].append(text)
    num_bytes = {text: len(text.encode()) for text in texts}
    for text in texts:
        # Few tokens have a character inside with which others begin.
        for first in by_first.keys() & set(text[1:]):
            for other in by_first[first]:
                is_shorter = num_bytes[other] < num_bytes[text]
                if is_shorter or other == text or len({*text, *other}) == 1:
                    continue
                if end_begins(text, other):
                    raise UnsupportedModelError(
                        f"the special tokens {short(text)} and {short(other)} can overlap in a "
                        "text, and it is not certain which of them llama.cpp finds. Set model.path "
                        "to the model's safetensors folder."
                    )


def end_begins(text: str, other: str) -> bool:
    """Tell whether some end of `text`, not the whole of it, begins `other`.

    Takes time in proportion to the lengths: the prefix function of Knuth, Morris and Pratt over
    `other`, a separator, and `text` without its first character.
    """
    sequence = [*other[: len(text) - 1], None, *text[1:]]
    borders = [0] * len(sequence)
    for place in range(1, len(sequence)):
        border = borders[place - 1]
        while border and sequence[place] != sequence[border]:
            border = borders[border - 1]
        borders[place] = border + (sequence[place] == sequence[border])
    return borders[-1] > 0
