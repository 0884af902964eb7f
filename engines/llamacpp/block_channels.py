"""Replies that begin with a block of reasoning, such as ``<think>…</think>``. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from engines.llamacpp.channels import MAX_HEADER_CHARS, Channel, Channels, Part, Phase, Style, find, may_be


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
            self._unopened = self._unopened and may_be(text, style.opening)
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
        at = len(self._held[: find(self._held, self._style.answer_closings)].rstrip())
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
