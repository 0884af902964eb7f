"""Text to tokens: `llama_tokenize`, and the parts that it leaves to its caller.

- In vocabularies that put a space before the first word, it adds one to every text. So a text that continues another
  one is passed with a character in front, which takes the space, and whose tokens are removed.
- It adds a beginning of sequence even if the text has one, and an end of sequence that would prevent an answer. So it
  is asked for neither, and a beginning is added here if it is missing.
- Its regular expressions need stack for each character of a word, and a thread has enough for some 26,000. So long
  texts get a thread of their own with a stack that is large enough. Unused pages of it take no memory.
- With SentencePiece vocabularies, time grows with the square of a text's length; with one kind of BPE, with the square
  of a number's, with another, of a run of blanks. So long texts are cut at places that no token reaches across.
- It looks for every control token at every character that could begin one: Gemma's vocabulary has 6,000 that begin with
  ``<``, and a megabyte of these took 25 s. So long texts are read without control tokens where they spell none.
"""

from __future__ import annotations

import functools
import itertools
import re
import resource
import string
from collections.abc import Iterable, Iterator

from engines.errors import InvalidPrompt, PromptTooLong
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.own_thread import NoThread, on_own_thread
from engines.llamacpp.spelling import WHOLE_CHARS, Cuts, Spellings

_STACK_PER_CHAR = 640  # 512 MiB are enough for a word of 2**20 characters and 256 MiB are not
_STACK_LEAST = 1 << 20
_STACK_UNLIMITED = 2 << 20  # what glibc gives a thread under `ulimit -s unlimited`
_STACK_OTHERS = 256 << 10  # for the callers


def _own_stack_chars(most: int) -> int:
    """How many characters the stack of a usual thread has room for, which is as large as the process's may become."""
    stack, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if stack == resource.RLIM_INFINITY:
        stack = _STACK_UNLIMITED
    return max(0, min(most, (stack - _STACK_OTHERS) // _STACK_PER_CHAR))


OWN_STACK_CHARS = _own_stack_chars(8192)
"""Texts that are longer get a thread of their own."""

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes one
_TAKERS = ("\x01", "\x02", "\ue000", "\U000f0000")
_FOLLOWERS = ("a", " a", "1", "\n", "é", "字", "\x03")

_LOOKED_THROUGH = 1024  # characters from which on a text is looked through for control tokens
_LONG_CHARS = 64 * 1024  # texts that are worth a look at the whole vocabulary before they are read

_UNICODE_BLANKS = string.whitespace + "\x1c\x1d\x1e\x1f\x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
_UNICODE_BLANKS += "\u2028\u2029\u202f\u205f\u3000"  # all that `str.isspace` finds

_DIGITS = 99
_LONG_NUMBER = re.compile(rf"[0-9]{{{2 * _DIGITS},}}")
_MANY_BLANKS = 512
_JAIS_BLANK = r"[^\S\r\n\x1c-\x1f]"
_LONG_BLANKS = re.compile(rf"(?<!{_JAIS_BLANK}){_JAIS_BLANK}{{{2 * _MANY_BLANKS},}}(?!\s)")


class Tokenizer:
    """The tokenizer of a vocabulary. Any thread; the caller keeps the vocabulary open.

    Args:
        native: The model that has it.
    """

    def __init__(self, native: NativeModel) -> None:
        self._native = native
        self.cuts = Cuts({native.text(token): native.swallows_blanks(token) for token in native.specials})
        controls = [native.text(token) for token in native.controls]
        are_found = all(len(text) > 1 and "\ufffd" not in text for text in controls)  # not by half of a character
        self._controls = Spellings(controls) if are_found else None
        self._taker = self._find_taker()
        self._bos = native.bos if native.adds_bos else -1

    def tokenize(self, text: str, cuts: Iterable[int] = (), *, at_most: int | None = None) -> list[int]:
        """The tokens of a prompt, special ones too, with the beginning of a sequence if the vocabulary wants one.

        Args:
            text: The prompt.
            cuts: Places that no token reaches across, ascending.
            at_most: How many tokens are of use: a text that has more need not be read to its end.

        Raises:
            InvalidPrompt: It is no Unicode text.
            PromptTooLong: There are more than ``at_most``, and there is text left.
        """
        if at_most is not None and self._least_tokens(text) > at_most:
            raise PromptTooLong(at_most)
        tokens: list[int] = []
        begin = 0
        try:
            for end in itertools.chain(cuts, (len(text),)):
                for piece, goes_on in self._pieces(text[begin:end], goes_on=begin > 0):
                    if at_most is not None and len(tokens) > at_most:
                        raise PromptTooLong(len(tokens))
                    tokens += self._tokens(piece, goes_on=goes_on)
                begin = end
        except UnicodeEncodeError:
            raise InvalidPrompt("the text contains half a surrogate pair, which is not Unicode; remove it") from None
        if self._bos >= 0 and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        return tokens

    def spell(self, text: str) -> list[int]:
        """The tokens of a short text that goes on where another ended; what spells a control token is text."""
        taker, count = self._taker or ("", 0)
        return self._native.tokenize(taker + text, parse_special=False)[count:]

    def _least_tokens(self, text: str) -> int:
        """How many tokens a long text has at least, if nothing remains of its blanks and all others are the longest."""
        if len(text) < _LONG_CHARS or not (self._native.is_bpe or self._native.is_sentencepiece):
            return 0
        # One count of a blank is short; a split would hold Python's lock for as long as all of them take.
        return (len(text) - sum(text.count(blank) for blank in _UNICODE_BLANKS)) // self._longest

    @functools.cached_property
    def _longest(self) -> int:
        """Characters of the longest token, or more."""
        return max(len(self._native.text(token)) for token in range(self._native.n_vocab))

    def _pieces(self, text: str, *, goes_on: bool) -> Iterator[tuple[str, bool]]:
        """A text in pieces that can be tokenised one by one, and whether each goes on where a text ended."""
        for number, block in enumerate(self.cuts.pieces(text)):
            begin = 0
            for end in (*self._seams(block), len(block)):
                yield block[begin:end], bool(begin) or (goes_on and number == 0)
                begin = end

    def _seams(self, text: str) -> Iterator[int]:
        """Where a long text can be cut; none where the time for it grows with its length."""
        if len(text) <= 2 * WHOLE_CHARS:
            return
        if self._native.pre_tokenizer == "superbpe":
            for number in _LONG_NUMBER.finditer(text):  # its digits are taken in threes from the right
                yield from range(number.end() - len(number[0]) // _DIGITS * _DIGITS, number.end(), _DIGITS)
        elif self._native.pre_tokenizer == "jais-2":
            yield from self._apart(text, _seams_in_blanks(text))
        elif self._native.is_sentencepiece and self._taker is not None:
            last = 0
            for seam in self._apart(text, (match.start() for match in self._seam.finditer(text, 1))):
                if seam - last >= WHOLE_CHARS:
                    yield (last := seam)

    def _apart(self, text: str, places: Iterable[int]) -> Iterator[int]:
        """Those of some places in a text, ascending, that are not next to or inside of a special token."""
        end = (len(text), len(text))
        special = self.cuts.around(text)
        begin, stop = next(special, end)
        for place in places:
            while place > stop:
                begin, stop = next(special, end)
            if place < begin:
                yield place

    @functools.cached_property
    def _seam(self) -> re.Pattern[str]:
        """Finds places that no token reaches across: before a space, around a character that only stands alone."""
        joined: set[str] = set()
        words = True
        special = set(self._native.specials)
        for token in range(self._native.n_vocab):
            text = self._native.text(token)
            if len(text) > 1 and token not in special:
                joined.update(text)
                words = words and _SPACE not in text.lstrip(_SPACE)
        joined.discard(_SPACE)
        known = "".join(map(re.escape, sorted(joined | {" "})))
        alone = f"(?<=[^{known}])|(?=[^{known}])"
        return re.compile(f"{alone}|(?<! )(?= )" if words else alone)

    def _tokens(self, text: str, *, goes_on: bool) -> list[int]:
        if not goes_on or self._taker is None:
            return self._native_tokens(text)
        taker, count = self._taker
        return self._native_tokens(taker + text)[count:]

    def _native_tokens(self, text: str) -> list[int]:
        special = not self._spells_none(text)
        if len(text) <= OWN_STACK_CHARS or not self._native.is_bpe:
            return self._native.tokenize(text, parse_special=special)
        size = _STACK_LEAST + _STACK_PER_CHAR * len(text)
        try:
            return on_own_thread(
                "tokenizer", lambda: self._native.tokenize(text, parse_special=special), stack_bytes=size
            )
        except NoThread:
            raise InvalidPrompt("the prompt is longer than this machine's memory lets it be; shorten it") from None

    def _spells_none(self, text: str) -> bool:
        """Whether a long text has no control token in it."""
        return len(text) >= _LOOKED_THROUGH and self._controls is not None and not any(self._controls.longest(text))

    def _find_taker(self) -> tuple[str, int] | None:
        """A character that takes the space and joins with nothing, and the number of its tokens."""
        for taker in _TAKERS:
            own = self._native.tokenize(taker)
            if own and all(self._native.tokenize(taker + other)[: len(own)] == own for other in _FOLLOWERS):
                return taker, len(own)
        return None


def _seams_in_blanks(text: str) -> Iterator[int]:
    """Where words end in long runs of blanks that jais-2 cuts into words of so many, from the left."""
    for blanks in _LONG_BLANKS.finditer(text):
        yield from range(blanks.start() + _MANY_BLANKS, blanks.end(), _MANY_BLANKS)
