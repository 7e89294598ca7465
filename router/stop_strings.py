"""Find stop strings in text that comes in pieces. Pure.

The algorithm is Knuth, Morris and Pratt's: every character is compared twice at most on average, so
that neither long stop strings nor text that nearly matches one cost more than other text.
"""

from collections.abc import Sequence


class StopStrings:
    """Pass text through until one of several strings is complete; cut the text before it.

    The string that is complete first counts; of several that end together, the longest. The end
    of the text is held back while it could be the beginning of a stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._searches = [_Search(string) for string in stop]
        self._first_characters = frozenset(string[0] for string in stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take more text; return what is certain to stay. Once `found`, nothing more may come."""
        if not self._held and self._first_characters.isdisjoint(piece):
            return piece
        text = self._held + piece
        matches = [
            (num_read, -search.num_characters)
            for search in self._searches
            if (num_read := search.read(piece)) is not None
        ]
        if matches:
            num_read, minus_length = min(matches)
            split = len(self._held) + num_read + minus_length
            self.found = True
            self._held = ""
        else:
            split = len(text) - max(search.num_matched for search in self._searches)
            self._held = text[split:]
        return text[:split]

    def release(self) -> str:
        """Return the held text: no more will come."""
        held, self._held = self._held, ""
        return held


class _Search:
    """Looks for one string."""

    def __init__(self, string: str) -> None:
        self._string = string
        self._borders = [0]
        """At i: the length of the longest string that is a proper prefix and a suffix of the first
        i + 1 characters. Made as far as matches get, so that a request with long stop strings
        starts at no cost."""
        self.num_matched = 0
        """Characters of the string with which the text so far ends."""

    @property
    def num_characters(self) -> int:
        return len(self._string)

    def read(self, piece: str) -> int | None:
        """Read more text; return how much of it was read when the string was complete, or None."""
        string, matched = self._string, self.num_matched
        start = 0 if matched else piece.find(string[0])
        if start < 0:
            return None
        for position in range(start, len(piece)):
            character = piece[position]
            while matched and string[matched] != character:
                matched = self._border(matched)
            if string[matched] == character:
                matched += 1
                if matched == len(string):
                    return position + 1
        self.num_matched = matched
        return None

    def _border(self, length: int) -> int:
        string, borders = self._string, self._borders
        while len(borders) < length:
            border, character = borders[-1], string[len(borders)]
            while border and string[border] != character:
                border = borders[border - 1]
            borders.append(border + (string[border] == character))
        return borders[length - 1]
