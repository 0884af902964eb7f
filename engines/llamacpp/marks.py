"""Keeps users' text from becoming control tokens, and leaves no trace of that in the prompt.

A chat template writes its own control tokens and the users' text into one string. So characters with which users' text
may spell a control token are replaced by private ones before the template runs, and put back in what it wrote. Where
such a character was, a spelling is users' text, and the prompt is cut there, so that it is tokenised as text. The
template sees a text of the same length that it can trim, split, quote and compare like any other.

    a user writes              a<|im_end|>b
    the template sees          a.|im_end|>b                               (a private character for the dot)
    the template writes        <|im_start|>user a.|im_end|>b<|im_end|>
    and the parts are          <|im_start|>user a<   and   |im_end|>b<|im_end|>
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence

from engines.llamacpp.spelling import Spellings

_PRIVATE = range(0xF0000, 0xFFFFE)


class ControlTexts:
    """The texts of control tokens that users must not be able to spell."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._spellings = Spellings(texts)
        openings = {text[0] for text in self._spellings.texts if _is_mark(text[0])}
        self._opening = re.compile(f"[{re.escape(''.join(sorted(openings)))}]" if openings else r"(?!)")
        self._wordlike = Spellings(text for text in self._spellings.texts if not _is_mark(text[0]))
        self._heads = frozenset(text[:n] for text in self._wordlike.texts for n in range(1, len(text)))
        self._tails = frozenset(text[n:] for text in self._spellings.texts for n in range(1, len(text)))

    def marked(self, contents: Sequence[str], *, plain: Sequence[frozenset[str]]) -> tuple[list[str], Marks]:
        """Users' texts as a template may see them.

        Args:
            contents: The texts.
            plain: For each of them, control texts that stay as they are, so that a template finds them.
        """
        marks = Marks(contents, self._spellings)
        return [marks.put(text, self._places(text, but)) for text, but in zip(contents, plain, strict=True)], marks

    def _places(self, text: str, plain: frozenset[str]) -> set[int]:
        """Everything that could be, or become, the beginning of a control text, whatever a template does with it.

        A template may take a part out, and so put the two sides of ``<|im_<think>end|>`` together: so every character
        that opens a control text is marked. Where that is a letter or a space, only whole spellings are. What could end
        a text that the template has begun is marked at the outer end, blanks left out, because templates like to trim.
        """
        found = {
            opening.start()
            for opening in self._opening.finditer(text)
            if not any(text.startswith(left, opening.start()) for left in plain)
        }
        found.update(start for start, end in self._wordlike.within(text) if text[start:end] not in plain)
        core = text.strip()
        if core:
            left = text.find(core)
            sizes = range(1, min(max(self._spellings.lengths, default=0), len(core) + 1))
            if any(core[:n] in self._tails for n in sizes):
                found.add(left)
            if any(core[-n:] in self._heads for n in sizes):
                found.add(left + len(core) - 1)
        return found


def _is_mark(char: str) -> bool:
    """Whether a character is none that a template would quote, trim or change the case of."""
    return not char.isalnum() and not char.isspace() and char not in "\"'\\"


class Marks:
    """The private characters of one conversation.

    Args:
        contents: All that users wrote: none of its characters is taken.
        spellings: Of the control texts.
    """

    def __init__(self, contents: Iterable[str], spellings: Spellings) -> None:
        self._spellings = spellings
        taken = {char for text in contents for char in set(text) if ord(char) in _PRIVATE}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        self._private: dict[str, str] = {}  # a character -> the one that stands for it

    def put(self, text: str, places: Iterable[int]) -> str:
        """The text with private characters in these places."""
        chars = None
        for place in places:
            chars = chars or list(text)
            chars[place] = self._for(text[place])
        return text if chars is None else "".join(chars)

    def _for(self, char: str) -> str:
        if char not in self._private:
            self._private[char] = next(self._free)
        return self._private[char]

    def parts(self, rendered: str) -> list[str]:
        """What a template wrote, as it would be without marks, cut where users spell control tokens."""
        if not self._private:
            return [rendered]
        marks = [match.start() for match in re.finditer(f"[{''.join(self._private.values())}]", rendered)]
        text = rendered.translate({ord(private): char for char, private in self._private.items()})
        cuts: set[int] = set()
        for start, end in self._spellings.within(text):
            first = bisect_left(marks, start)
            if first < len(marks) and marks[first] < end:
                cuts.add(min(marks[first] + 1, end - 1))
        return [text[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(text)])]
