r"""Which characters of a model's reply are its answer, which are reasoning, and which only mark the two.

Pure: text goes in, in any pieces, and the channel of each character comes out, in order. It does not matter how the
text was cut; what could yet become a marker is held back.

    a model writes    <think>\nTwo rivers.\n</think>\n\nThe Rhine.
    reasoning is               Two rivers.
    the answer is                                          The Rhine.

Blanks next to a marker belong to the marker. Once the answer has begun, a block marker in it is only text; in formats
that consist of messages, one may be followed by others. `block_channels` and `message_channels` are the two kinds, and
`families` says which models write what.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass

MAX_HEADER_CHARS = 256
"""A header of a message that is longer is none; nor are markers that end the answer, where they are."""


class Channel(enum.Enum):
    """What a character is part of."""

    ANSWER = enum.auto()
    REASONING = enum.auto()
    MARKUP = enum.auto()


class Phase(enum.Enum):
    """What a model can write next."""

    UNDECIDED = enum.auto()
    """A marker that opens reasoning, or the answer."""
    REASONING = enum.auto()
    """Reasoning, or the markup around it: no answer before that has ended."""
    ANSWER = enum.auto()
    """The answer; any reasoning is over."""


Part = tuple[Channel, int]
"""The channel of the next so many characters."""


class Channels(ABC):
    """The channels of one reply."""

    def __init__(self) -> None:
        self._held = ""  # not yet decided

    @property
    @abstractmethod
    def phase(self) -> Phase:
        """What can come next."""

    def read(self, text: str) -> list[Part]:
        """The channels of the next characters that are certain now, those that were held back first."""
        self._held += text
        parts = []
        while self._held and (part := self._next()) is not None:
            parts.append(part)
            self._held = self._held[part[1] :]
        return parts

    @abstractmethod
    def flush(self) -> list[Part]:
        """The channels of all characters that were held back: the reply is over."""

    @abstractmethod
    def _next(self) -> Part | None:
        """The channel of the first characters that are held; None if that takes more text."""

    def _reasoning(self, *ends: str) -> Part | None:
        """As `_next`, in reasoning up to one of these markers."""
        at = find(self._held, ends)
        text = self._held[:at].rstrip()
        return (Channel.REASONING, len(text)) if text else None

    def _all_reasoning(self) -> list[Part]:
        text = self._held.rstrip()
        return [(Channel.REASONING, len(text)), (Channel.MARKUP, len(self._held) - len(text))]


def find(text: str, markers: tuple[str, ...]) -> int:
    """Where the first of some markers begins, or what may become one; the length of the text if there is none."""
    first = len(text)
    for marker in markers:
        at = text.find(marker)
        first = min(first, at if at >= 0 else len(text) - _overlap(text, marker))
    return first


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    at = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while at >= 0 and not marker.startswith(text[at:]):
        at = text.find(marker[0], at + 1)
    return len(text) - at if at >= 0 else 0


def may_be(text: str, marker: str) -> bool:
    """Whether a text begins with a marker, as far as there is any of it."""
    return text.startswith(marker[: len(text)])


@dataclass(frozen=True, kw_only=True)
class Style(ABC):
    """How a family of models marks its reasoning.

    Attributes:
        signs: Texts that a chat template has of which this is the style.
        tokens: The control tokens among the markers, if the vocabulary has them: then only these tokens are markers,
            and text that looks like them is text. Empty if the markers are text themselves.
    """

    signs: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    @abstractmethod
    def open(self) -> Channels:
        """The channels of a reply of which nothing is written yet."""

    @abstractmethod
    def begun(self, prompt: str, continued: str) -> str:
        """What there is of a reply already, with all that tells how it goes on.

        Args:
            prompt: What a chat template has written before the reply, or the end of that.
            continued: What a user has written of it. A block may be open in it, but it has no headers.
        """

    def without_markers(self, text: str) -> str:
        """Text of a token that cannot be part of a marker, of the same length, so that it is not taken for one."""
        return text.replace(self.tokens[0][0], "\0") if self.tokens else text
