"""Guesses of what comes next, looked up in what a sequence has read and written: functions of plain values.

Who edits a text, fills in a form, extracts fields or quotes writes again what is in the prompt, or in the output
already. So the text is aligned with an earlier part of itself that ends alike, and what followed there is the guess.

For example, the prompt holds "the quick brown fox jumps over the dog", and the output so far is "the quick":
- both end alike, so the guess is "brown fox jumps over the dog";
- "red" is written instead: nothing ends alike, and the guess is what would follow if one word replaced another, "fox";
- "brown" follows: it stands near where the alignment was lost, so "red" was put in, and "fox jumps" is the guess.

A sequence takes in a token in constant time: nothing looks through its text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_PLACES = 8
"""Earlier places that end with the same two tokens, of which the one that agrees longest is chosen."""

_LONGEST = 32
"""Tokens that are compared to find it."""

_NEAR = 8
"""Tokens from where an alignment was lost on, in which one token is enough to find it again."""

_PATIENCE = 4
"""Wrong guesses in a row after which an alignment is given up."""

CATCH_UP = 2048
"""Tokens of a prompt that are taken in at once, in about half a millisecond; a longer one takes more steps."""


class Lookup:
    """One sequence's text, and the place in it with which its end is aligned.

    Args:
        prompt: Its first tokens.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._tokens = list(prompt)
        self._known = 1  # tokens before this are in the index, as the second of two
        self._latest: dict[int, int] = {}  # two tokens -> the place after their last occurrence
        self._earlier = array("l", [-1, -1])  # by place, the one before it that follows the same two tokens
        self._at = -1  # the place of the next guess
        self._agree = 0
        self._lost = -1  # where the alignment was when it guessed wrong
        self._wrong = 0

    @property
    def agree(self) -> int:
        """How many tokens at the end of the text are the same as before the next guess; 0 after a wrong one."""
        return self._agree

    @property
    def expected(self) -> int | None:
        """The first token of a guess; None if there is none."""
        return self._tokens[self._at] if self._at >= 0 else None

    def took(self, token: int) -> None:
        """The text goes on with this token."""
        right = self._at >= 0 and self._tokens[self._at] == token
        self._tokens.append(token)
        self._read(CATCH_UP)
        if right:
            self._at, self._agree, self._wrong = self._at + 1, min(self._agree + 1, _LONGEST), 0
        else:
            self._realign()

    def guess(self, most: int) -> Sequence[int]:
        """The next tokens, at most so many; as if what repeats goes on doing so."""
        if self._at < 0 or most < 1:
            return ()
        guess = self._tokens[self._at : self._at + most]
        period = len(guess)
        while len(guess) < most:
            guess.append(guess[-period])
        return guess

    def _read(self, most: int) -> None:
        """Take the next tokens into the index, all but the last place, which nothing follows yet."""
        tokens, latest, earlier = self._tokens, self._latest, self._earlier
        end = min(len(tokens) - 1, self._known + most)
        for place in range(self._known, end):
            pair = tokens[place - 1] << 32 | tokens[place]
            earlier.append(latest.get(pair, -1))
            latest[pair] = place + 1
        self._known = max(self._known, end)

    def _realign(self) -> None:
        """Look for the place that agrees longest; without one, near where the alignment was lost."""
        if self._at >= 0:
            if not self._wrong:
                self._lost = self._at
            self._wrong += 1
            if self._wrong > _PATIENCE:
                self._lost = -1
        place, agree = self._longest()
        if place < 0 <= self._lost:
            place, agree = self._nearby(), 1
        if place >= 0:
            self._at, self._agree = place, agree
        elif self._lost >= 0 and self._at + 1 < len(self._tokens) - 1:
            self._at, self._agree = self._at + 1, 0
        else:
            self._at, self._agree, self._lost, self._wrong = -1, 0, -1, 0

    def _longest(self) -> tuple[int, int]:
        tokens = self._tokens
        place = self._latest.get(tokens[-2] << 32 | tokens[-1], -1) if len(tokens) > 1 else -1
        best, longest = -1, 0
        for _ in range(_PLACES):
            if place < 0:
                break
            agree = self._agreement(place)
            if agree > longest:
                best, longest = place, agree
            place = self._earlier[place]
        return best, longest

    def _agreement(self, place: int) -> int:
        """How many tokens before a place are the same as at the end."""
        tokens, end = self._tokens, len(self._tokens)
        agree, most = 2, min(_LONGEST, place)
        while agree < most and tokens[place - 1 - agree] == tokens[end - 1 - agree]:
            agree += 1
        return agree

    def _nearby(self) -> int:
        tokens = self._tokens
        try:
            found = tokens.index(tokens[-1], self._lost, min(self._lost + _NEAR, len(tokens) - 1))
        except ValueError:
            return -1
        return found + 1
