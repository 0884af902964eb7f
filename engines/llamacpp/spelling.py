"""Where a text spells special tokens, and where that lets it be cut without changing its tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

WHOLE_CHARS = 4096
"""Texts up to this length are tokenised in one piece, longer ones in pieces of at least this length."""

AT_ONCE = 1 << 16
"""Characters that are searched in one call: it holds Python's lock for half a millisecond."""

_BLANKS = " \t\n\v\f\r"
_BLANK = re.compile(f"[{_BLANKS}]*")


class Spellings:
    """Finds texts in another one; those of a single character are left out."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = frozenset(text for text in texts if len(text) > 1)
        self.lengths = sorted({len(text) for text in self.texts})
        by_opening: dict[str, set[int]] = {}  # its first two characters -> the lengths of those that begin so
        for text in self.texts:
            by_opening.setdefault(text[:2], set()).add(len(text))
        self._lengths = {opening: sorted(lengths) for opening, lengths in by_opening.items()}
        self._opening = re.compile(f"(?={'|'.join(sorted(map(re.escape, by_opening))) or r'(?!)'})")

    def within(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of every one, overlapping ones too, by start and then by length."""
        for start in self._openings(text):
            for end in self._ends(text, start):
                yield start, end

    def longest(self, text: str) -> Iterator[tuple[int, int]]:
        """The same of the longest that begins at each place: a run of blanks may spell dozens at every one."""
        for start in self._openings(text):
            for end in self._ends(text, start, longest_first=True):
                yield start, end
                break

    def are_several(self, text: str, start: int) -> bool:
        """Whether more than one begins at a place."""
        return sum(1 for _ in self._ends(text, start)) > 1

    def _openings(self, text: str) -> Iterator[int]:
        for begin in range(0, len(text), AT_ONCE):
            for opening in self._opening.finditer(text, begin, begin + AT_ONCE + 1):  # one begins with two characters
                yield opening.start()

    def _ends(self, text: str, start: int, *, longest_first: bool = False) -> Iterator[int]:
        lengths = self._lengths.get(text[start : start + 2], [])
        for length in reversed(lengths) if longest_first else lengths:
            end = start + length
            if end <= len(text) and text[start:end] in self.texts:
                yield end


class Cuts:
    """Cuts long texts behind special tokens.

    The time that llama.cpp takes to find special tokens grows with the square of their number (60,000: 3.6 s, 180,000:
    more than 20 s); in pieces, with the length of the text. What lies between two of them it takes by itself anyway.

    A cut is safe behind a token that overlaps no other, so that llama.cpp is sure to see it; where the token swallows
    the blanks behind it, behind those.

    Args:
        specials: The text of every special token, and whether it swallows the blanks behind it.
    """

    def __init__(self, specials: Mapping[str, bool]) -> None:
        self._swallows = specials
        self._spellings = Spellings(specials)

    def pieces(self, text: str, *, at_least: int = WHOLE_CHARS) -> Iterator[str]:
        """The text in order; one after another they give the tokens of the whole."""
        if len(text) <= at_least:
            yield text
            return
        begin = 0
        for cut in self._places(text):
            if cut - begin >= at_least:
                yield text[begin:cut]
                begin = cut
        yield text[begin:]

    def around(self, text: str) -> Iterator[tuple[int, int]]:
        """Start and end of everything that may be special tokens, with the blanks that these may swallow."""
        begin, end = 0, -1  # of those found last
        for start, stop in self._spellings.longest(text):
            if stop <= end:
                continue  # in a long run of blanks that are tokens, its end need not be looked for from every place
            before = start
            while before > max(end, 0) and text[before - 1] in _BLANKS:
                before -= 1
            behind = _BLANK.match(text, stop)
            stop = stop if behind is None else behind.end()
            if before > end >= 0:
                yield begin, end
            if before > end:
                begin = before
            end = max(end, stop)
        if end >= 0:
            yield begin, end

    def _places(self, text: str) -> Iterator[int]:
        first, end, alone = 0, 0, False
        for start, stop in self._spellings.longest(text):
            if start < end:
                alone, end = False, max(end, stop)
                continue
            if alone and (cut := self._behind(text, first, end)) <= start:
                yield cut
            first, end, alone = start, stop, not self._spellings.are_several(text, start)

    def _behind(self, text: str, start: int, end: int) -> int:
        if not self._swallows[text[start:end]]:
            return end
        blanks = _BLANK.match(text, end)
        return end if blanks is None else blanks.end()
