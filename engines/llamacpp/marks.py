"""Keeps users' text from becoming control tokens, and leaves no trace of that in the prompt.

A chat template writes its own control tokens and the users' text into one string. So characters with which users' text
may spell a control token are replaced by private ones before the template runs, and put back in what it wrote. Where
such a character was, a spelling is users' text, and the prompt is cut there, so that it is tokenised as text. The
template sees a text of the same length that it can trim, split, quote and compare like any other.

    a user writes              a<|im_end|>b
    the template sees          a.|im_end|>b                               (a private character for the dot)
    the template writes        <|im_start|>user a.|im_end|>b<|im_end|>
    and is cut into            <|im_start|>user a<   and   |im_end|>b<|im_end|>
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from engines.llamacpp.spelling import Spellings

_PRIVATE = range(0xF0000, 0xFFFFE)
_SOME_PRIVATE = re.compile(f"[{chr(_PRIVATE[0])}-{chr(_PRIVATE[-1])}]")


class ControlTexts:
    """The texts of control tokens that users must not be able to spell."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.spellings = Spellings(texts)
        self._openings = sorted({text[0] for text in self.spellings.texts if _is_mark(text[0])})
        self._wordlike = Spellings(text for text in self.spellings.texts if not _is_mark(text[0]))
        self._heads = frozenset(text[:n] for text in self._wordlike.texts for n in range(1, len(text)))
        self._tails = frozenset(text[n:] for text in self.spellings.texts for n in range(1, len(text)))
        self._insides = "\0".join(sorted(text[1:-1] for text in self.spellings.texts))

    def cuts(self, rendered: str, text: str) -> Iterator[int]:
        """Places inside of every control text that users spell, ascending.

        Args:
            rendered: What a template wrote of marked texts.
            text: The same with its marks taken away.
        """
        last = 0
        for start, end in self.spellings.within(text) if rendered != text else ():
            if last <= start and rendered[start:end] != text[start:end]:
                marked = next(at for at in range(start, end) if rendered[at] != text[at])
                last = min(marked + 1, end - 1)
                yield last

    def marked(self, contents: Sequence[str], *, plain: Sequence[frozenset[str]]) -> tuple[list[str], Marks]:
        """Users' texts as a template may see them.

        A template may take a part out, and so put the two sides of ``<|im_<think>end|>`` together: so every character
        that opens a control text is marked. Where that is a letter or a space, only whole spellings are. What could end
        a text that the template has begun is marked at the outer end, blanks left out, because templates like to trim;
        so is what could be the middle of one that the template begins and ends.

        Args:
            contents: The texts.
            plain: For each of them, control texts that stay as they are, so that a template finds them.
        """
        marks = Marks(contents)
        return [self._mark(marks, text, but) for text, but in zip(contents, plain, strict=True)], marks

    def _mark(self, marks: Marks, text: str, plain: frozenset[str]) -> str:
        places = {start for start, end in self._wordlike.within(text) if text[start:end] not in plain}
        core = text.strip()
        if core:
            left = text.find(core)
            sizes = range(1, min(max(self.spellings.lengths, default=0), len(core) + 1))
            if any(core[:n] in self._tails for n in sizes):
                places.add(left)
            if any(core[-n:] in self._heads for n in sizes):
                places.add(left + len(core) - 1)
            if len(core) in sizes and core in self._insides:
                places.add(left)
        parts = re.split(f"({'|'.join(map(re.escape, plain))})", text) if plain else [text]
        for opening in self._openings:
            parts[::2] = [marks.put(part, opening) for part in parts[::2]]
        return marks.put_at("".join(parts), places)


def _is_mark(char: str) -> bool:
    """Whether a character is none that a template would quote, trim or change the case of."""
    return not char.isalnum() and not char.isspace() and char not in "\"'\\"


class Marks:
    """The private characters of one conversation.

    Args:
        contents: All that users wrote: none of its characters is taken.
    """

    def __init__(self, contents: Iterable[str]) -> None:
        # A set of a long text's characters would take four times as long, and hold Python's lock meanwhile.
        taken = {char for text in contents if not text.isascii() for char in _SOME_PRIVATE.findall(text)}
        self._free = (chr(code) for code in _PRIVATE if chr(code) not in taken)
        self._private: dict[str, str] = {}  # a character -> the one that stands for it

    def put(self, text: str, char: str) -> str:
        """The text with a private character in place of each of these."""
        return text.replace(char, self._for(char)) if char in text else text

    def put_at(self, text: str, places: Iterable[int]) -> str:
        """The text with private characters in these places."""
        chars = None
        for place in places:
            if ord(text[place]) not in _PRIVATE or text[place] not in self._private.values():
                chars = chars or list(text)
                chars[place] = self._for(text[place])
        return text if chars is None else "".join(chars)

    def _for(self, char: str) -> str:
        if char not in self._private:
            self._private[char] = next(self._free)
        return self._private[char]

    def taken_from(self, rendered: str) -> str:
        """What a template wrote, as it would be without marks."""
        for char, private in self._private.items():
            rendered = rendered.replace(private, char)  # `translate` holds Python's lock for a tenth of a second
        return rendered
