"""Replies that consist of messages, each with a header that names its channel, such as those of gpt-oss. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engines.llamacpp.channels import MAX_HEADER_CHARS, Channel, Channels, Part, Phase, Style, find, may_be


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
        at = find(self._held, self._breaks)
        return (Channel.ANSWER, at) if at else None

    def _header(self) -> Part | None:
        style = self._style
        size = find(self._held, style.bodies)
        header = self._held[:size]
        body = next((body for body in style.bodies if self._held.startswith(body, size)), "")
        begun = len(style.assistant) if self._held.startswith(style.assistant) else 0
        rest = self._held[begun:].lstrip()
        if size > MAX_HEADER_CHARS or not any(may_be(rest[: len(text)], text) for text in style.header):
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
