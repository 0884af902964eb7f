r"""Which characters of a model's reply are its answer, which are reasoning, and which only mark the two.

Pure: text goes in, in any pieces, and the channel of each character comes out, in order. It does not matter how the
text was cut; what could yet become a marker is held back.

    a model writes    <think>\nTwo rivers.\n</think>\n\nThe Rhine.
    reasoning is               Two rivers.
    the answer is                                          The Rhine.

Blanks next to a marker belong to the marker. Once the answer has begun, a block marker in it is only text; a message of
the harmony format may be followed by others.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MAX_HEADER_CHARS = 256
"""A header of the harmony format that is longer is none."""


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


class BlockChannels(Channels):
    """Of a model that thinks in blocks at the beginning of its reply."""

    def __init__(self, opening: str, closing: str) -> None:
        super().__init__()
        self._opening, self._closing = opening, closing
        self._phase = Phase.UNDECIDED
        self._inside = False  # whether the block's text has begun
        self._answers = False  # whether all that follows is the answer

    @property
    def phase(self) -> Phase:
        """See `Channels`."""
        return self._phase

    def _next(self) -> Part | None:
        if self._answers:
            return Channel.ANSWER, len(self._held)
        text = self._held.lstrip()
        blanks = len(self._held) - len(text)
        if self._phase is Phase.REASONING:
            if blanks and not self._inside:
                return Channel.MARKUP, blanks
            self._inside = True
            if not text.startswith(self._closing):
                return self._reasoning(self._closing)
        for marker in (self._opening, self._closing):
            if text.startswith(marker):
                self._inside = False
                self._phase = Phase.REASONING if marker == self._opening else Phase.ANSWER
                return Channel.MARKUP, blanks + len(marker)
        if self._opening.startswith(text) or self._closing.startswith(text):
            return None
        return self._answer(blanks)

    def _answer(self, blanks: int) -> Part:
        """The answer begins; blanks before it are a part of it if there was no block."""
        self._answers = True
        if self._phase is Phase.ANSWER and blanks:
            return Channel.MARKUP, blanks
        self._phase = Phase.ANSWER
        return Channel.ANSWER, len(self._held)

    def flush(self) -> list[Part]:
        """See `Channels`."""
        if self._phase is Phase.REASONING:
            return self._all_reasoning()
        blanks = len(self._held) - len(self._held.lstrip()) if self._phase is Phase.ANSWER else 0
        return [(Channel.MARKUP, blanks), (Channel.ANSWER, len(self._held) - blanks)]


_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_ASSISTANT = f"{_START}assistant"
_HEADERS = (_START, _CHANNEL, _MESSAGE, "to=")
_BREAKS = (_END, _START, _CHANNEL)


class HarmonyChannels(Channels):
    """Of gpt-oss: messages of several channels, each behind a header."""

    def __init__(self) -> None:
        super().__init__()
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
        if text.startswith(_END):
            self._channel = Channel.MARKUP
            return Channel.MARKUP, blanks + len(_END)
        if text.startswith((_START, _CHANNEL)):
            self._channel = Channel.MARKUP
            return (Channel.MARKUP, blanks) if blanks else self._header()
        self._inside = True
        if thinks:
            return self._reasoning(*_BREAKS)
        at = _find(self._held, _BREAKS)
        return (Channel.ANSWER, at) if at else None

    def _header(self) -> Part | None:
        header, complete, _ = self._held.partition(_MESSAGE)
        begun = len(_ASSISTANT) if header.startswith(_ASSISTANT) else 0
        rest = self._held[begun:].lstrip()
        size = len(header) - (0 if complete else _overlap(header, _MESSAGE))
        if size > MAX_HEADER_CHARS or not any(rest[: len(text)] == text[: len(rest)] for text in _HEADERS):
            self._channel = Channel.ANSWER  # a model that does not keep to the format
            return (Channel.MARKUP, begun) if begun else (Channel.ANSWER, 1)
        if not complete:
            return None
        name = header.rpartition(_CHANNEL)[2].lstrip()
        self._channel = Channel.REASONING if name.startswith("analysis") else Channel.ANSWER
        self._inside = False
        return Channel.MARKUP, len(header) + len(_MESSAGE)

    def flush(self) -> list[Part]:
        """See `Channels`."""
        if self._channel is Channel.REASONING:
            return self._all_reasoning()
        return [(self._channel, len(self._held))]


@dataclass(frozen=True)
class Style:
    """How a family of models marks its reasoning.

    Attributes:
        opening: What reasoning begins with; None for the harmony format.
        closing: What ends it.
        tokens: The control tokens in that, where the vocabulary has them: then only these tokens are markers, and text
            that looks like them is text. Empty where the markers are text themselves.
    """

    opening: str | None
    closing: str
    tokens: tuple[str, ...] = ()

    def open(self) -> Channels:
        """The channels of a reply of which nothing is written yet."""
        return HarmonyChannels() if self.opening is None else BlockChannels(self.opening, self.closing)

    def begun(self, prompt: str, continued: str) -> str:
        """What there is of a reply already, with all that tells how it goes on.

        Args:
            prompt: What a chat template has written before the reply, or the end of that.
            continued: What a user has written of it. A block may be open in it, but it has no headers.
        """
        if self.opening is None:
            header = prompt[at:] if (at := prompt.rfind(_START)) >= 0 else _ASSISTANT
            return header + continued.replace(_START[0], "\0")
        text = prompt.rstrip()
        marker = next((marker for marker in (self.opening, self.closing) if text.endswith(marker)), "")
        return (marker and prompt[len(text) - len(marker) :]) + continued

    def without_markers(self, text: str) -> str:
        """Text of a token that cannot be part of a marker, of the same length, so that it is not taken for one."""
        return text.replace(self.tokens[0][0], "\0") if self.tokens else text


_HARMONY: Final = Style(None, _END, (_CHANNEL, _MESSAGE, _START, _END))
_STYLES: Final = (
    Style("<|channel>thought", "<channel|>", ("<|channel>", "<channel|>")),  # Gemma 4
    *(
        Style(opening, closing, (opening, closing))
        for opening, closing in (
            ("<think>", "</think>"),  # Qwen, DeepSeek, GLM, and most others
            ("[THINK]", "[/THINK]"),  # Mistral
            ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
            ("<seed:think>", "</seed:think>"),
            ("<mm:think>", "</mm:think>"),  # MiniMax
            ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
        )
    ),
)


def find_style(template: str, *, is_token: Callable[[str], bool]) -> Style | None:
    """How a model marks its reasoning, None if it does not or if its way is not known.

    Args:
        template: The source of its chat template; may be empty.
        is_token: Whether a text is a token of its own in its vocabulary, which text is never made into.
    """
    if _CHANNEL in template and _MESSAGE in template:
        found: Style | None = _HARMONY
    else:
        found = next((style for style in _STYLES if style.closing in template), None)
        found = found or next((style for style in _STYLES if all(map(is_token, style.tokens))), None)
    if found is None or all(map(is_token, found.tokens)):
        return found
    return Style(found.opening, found.closing)
