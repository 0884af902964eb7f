r"""Which characters of a model's reply are its answer, which are reasoning, and which only mark the two.

Pure: text goes in, in any pieces, and the channel of each character comes out, in order. It does not matter how the
text was cut; what could yet become a marker is held back.

    a model writes    <think>\nTwo rivers.\n</think>\n\nThe Rhine.
    reasoning is               Two rivers.
    the answer is                                          The Rhine.

Blanks next to a marker belong to the marker. Once the answer has begun, a block marker in it is only text; in formats
that consist of messages, one may be followed by others. `families` says which models write what.
"""

from __future__ import annotations

import enum
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

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
        at = _find(self._held, ends)
        text = self._held[:at].rstrip()
        return (Channel.REASONING, len(text)) if text else None

    def _all_reasoning(self) -> list[Part]:
        text = self._held.rstrip()
        return [(Channel.REASONING, len(text)), (Channel.MARKUP, len(self._held) - len(text))]


def _find(text: str, markers: tuple[str, ...]) -> int:
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


@dataclass(frozen=True)
class Blocks(Style):
    """Reasoning is a block at the beginning of a reply; the answer may be one too.

    Attributes:
        opening: What reasoning begins with.
        closing: What ends it.
        opened: Whether a reply begins with reasoning although nothing says so.
        answer_openings: What the answer may begin with.
        answer_closings: What may end it, if it has begun with one of these; if there are none, after any reasoning.
    """

    opening: str
    closing: str
    opened: bool = False
    answer_openings: tuple[str, ...] = ()
    answer_closings: tuple[str, ...] = ()

    def open(self) -> Channels:
        """See `Style`."""
        return BlockChannels(self)

    def begun(self, prompt: str, continued: str) -> str:
        """See `Style`."""
        text = prompt.rstrip()
        markers = (self.opening, self.closing, *self.answer_openings)
        marker = next((marker for marker in markers if text.endswith(marker)), "")
        if marker:
            return prompt[len(text) - len(marker) :] + continued
        if self.opened and continued and not any(marker in continued for marker in markers):
            return self.closing + continued  # users write answers
        return continued

    @cached_property
    def tail(self) -> re.Pattern[str]:
        """Blanks and markers that may end the answer."""
        return re.compile(rf"(?:\s|{'|'.join(map(re.escape, self.answer_closings))})*")


class BlockChannels(Channels):
    """Of a model that thinks in blocks at the beginning of its reply."""

    def __init__(self, style: Blocks) -> None:
        super().__init__()
        self._style = style
        self._phase = Phase.REASONING if style.opened else Phase.UNDECIDED
        self._unopened = style.opened  # whether reasoning has begun without its marker, which may follow
        self._inside = False  # whether the block's text has begun
        self._answers = False  # whether all that follows is the answer
        self._wrapped = False  # whether a marker may end the answer

    @property
    def phase(self) -> Phase:
        """See `Channels`."""
        return self._phase

    def _next(self) -> Part | None:
        if self._answers:
            return self._wrapped_answer() if self._wrapped else (Channel.ANSWER, len(self._held))
        style = self._style
        text = self._held.lstrip()
        blanks = len(self._held) - len(text)
        if self._phase is Phase.REASONING:
            if blanks and not self._inside:
                return Channel.MARKUP, blanks
            self._unopened = self._unopened and _may_be(text, style.opening)
            self._inside = not self._unopened
            if self._inside and not text.startswith(style.closing):
                return self._reasoning(style.closing)
        markers = (style.opening, style.closing, *style.answer_openings)
        for marker in markers:
            if text.startswith(marker):
                self._pass(marker)
                return Channel.MARKUP, blanks + len(marker)
        if any(marker.startswith(text) for marker in markers):
            return None
        return self._answer(blanks)

    def _pass(self, marker: str) -> None:
        style = self._style
        self._inside = self._unopened = False
        self._phase = Phase.REASONING if marker == style.opening else Phase.ANSWER
        self._wrapped = bool(style.answer_closings) and marker in (style.answer_openings or (style.closing,))

    def _answer(self, blanks: int) -> Part | None:
        """The answer begins; blanks before it are a part of it if there was no block."""
        self._answers = True
        if self._phase is Phase.ANSWER and blanks:
            return Channel.MARKUP, blanks
        self._phase = Phase.ANSWER
        return self._next()

    def _wrapped_answer(self) -> Part | None:
        """Markers at the very end of the answer are none of it; what could yet be the end is held back."""
        at = len(self._held[: _find(self._held, self._style.answer_closings)].rstrip())
        if at:
            return Channel.ANSWER, at
        tail = self._style.tail.match(self._held)
        assert tail is not None  # it may be empty
        rest = self._held[tail.end() :]
        if len(self._held) > MAX_HEADER_CHARS or not any(end.startswith(rest) for end in self._style.answer_closings):
            return Channel.ANSWER, 1
        return None

    def flush(self) -> list[Part]:
        """See `Channels`."""
        if self._phase is Phase.REASONING:
            return self._all_reasoning()
        if self._answers:
            ended = any(end in self._held for end in self._style.answer_closings)
            return [(Channel.MARKUP if ended else Channel.ANSWER, len(self._held))]
        blanks = len(self._held) - len(self._held.lstrip()) if self._phase is Phase.ANSWER else 0
        return [(Channel.MARKUP, blanks), (Channel.ANSWER, len(self._held) - blanks)]


def _may_be(text: str, marker: str) -> bool:
    """Whether a text begins with a marker, as far as there is any of it."""
    return text.startswith(marker[: len(text)])


@dataclass(frozen=True)
class Messages(Style):
    """A reply consists of messages, each behind a header that says whether it is reasoning.

    Attributes:
        starts: What the header of another message begins with. The first one is written before the role.
        header: What a header may begin with, behind start and role.
        bodies: What ends a header.
        thinks: Finds in a header, with what ends it, that its message is reasoning.
        ends: What ends a message.
    """

    starts: tuple[str, ...]
    header: tuple[str, ...]
    bodies: tuple[str, ...]
    thinks: re.Pattern[str]
    ends: tuple[str, ...]

    @property
    def assistant(self) -> str:
        """What a template writes before a reply."""
        return f"{self.starts[0]}assistant"

    def open(self) -> Channels:
        """See `Style`."""
        return MessageChannels(self)

    def begun(self, prompt: str, continued: str) -> str:
        """See `Style`."""
        header = prompt[at:] if (at := prompt.rfind(self.starts[0])) >= 0 else self.assistant
        return header + continued.replace(self.starts[0][0], "\0")


class MessageChannels(Channels):
    """Of a model whose reply is messages of several channels, such as gpt-oss."""

    def __init__(self, style: Messages) -> None:
        super().__init__()
        self._style = style
        self._breaks = (*style.ends, *style.starts)
        self._channel = Channel.MARKUP  # that of a header
        self._inside = False  # whether the message's text has begun

    @property
    def phase(self) -> Phase:
        """See `Channels`."""
        return Phase.ANSWER if self._channel is Channel.ANSWER else Phase.REASONING

    def _next(self) -> Part | None:
        if self._channel is Channel.MARKUP:
            return self._header()
        thinks = self._channel is Channel.REASONING
        text = self._held.lstrip() if thinks else self._held
        blanks = len(self._held) - len(text)
        if blanks and not self._inside:
            return Channel.MARKUP, blanks
        for end in self._style.ends:
            if text.startswith(end):
                self._channel = Channel.MARKUP
                return Channel.MARKUP, blanks + len(end)
        if text.startswith(self._style.starts):
            self._channel = Channel.MARKUP
            return (Channel.MARKUP, blanks) if blanks else self._header()
        self._inside = True
        if thinks:
            return self._reasoning(*self._breaks)
        at = _find(self._held, self._breaks)
        return (Channel.ANSWER, at) if at else None

    def _header(self) -> Part | None:
        style = self._style
        size = _find(self._held, style.bodies)
        header = self._held[:size]
        body = next((body for body in style.bodies if self._held.startswith(body, size)), "")
        begun = len(style.assistant) if self._held.startswith(style.assistant) else 0
        rest = self._held[begun:].lstrip()
        if size > MAX_HEADER_CHARS or not any(_may_be(rest[: len(text)], text) for text in style.header):
            self._channel = Channel.ANSWER  # a model that does not keep to the format
            return (Channel.MARKUP, begun) if begun else (Channel.ANSWER, 1)
        if not body:
            return None
        self._channel = Channel.REASONING if style.thinks.search(header + body) else Channel.ANSWER
        self._inside = False
        return Channel.MARKUP, len(header) + len(body)

    def flush(self) -> list[Part]:
        """See `Channels`."""
        if self._channel is Channel.REASONING:
            return self._all_reasoning()
        return [(self._channel, len(self._held))]
