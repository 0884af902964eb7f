"""What has happened in the choices of a request, as an answer in chunks or as a whole one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import UNSET, UnsetType

from orchd.openai.answers import (
    AssistantMessage,
    Call,
    Called,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    Finish,
    TextChoice,
    TextCompletion,
    Usage,
)
from orchd.openai.running import Step
from orchd.openai.tasks import Job


@dataclass(frozen=True)
class Head:
    """What every answer and every chunk begins with.

    Attributes:
        id: Of the request, without its prefix.
        created: When it came, in seconds since 1970.
        model: Who answers.
        with_usage: Whether chunks have a field for usage, which only the last one fills.
    """

    id: str
    created: int
    model: str
    with_usage: bool = False

    @property
    def no_usage(self) -> UnsetType | None:
        """What the field holds in all chunks but the last."""
        return None if self.with_usage else UNSET


class Reply(Protocol):
    """The shape of a kind of answer; its results are to be encoded as JSON."""

    def opening(self, jobs: Sequence[Job]) -> list[object]:
        """Chunks before anything is written."""

    def chunk(self, step: Step) -> object:
        """A step as a chunk."""

    def closing(self, usage: Usage) -> list[object]:
        """Chunks after everything is written."""

    def whole(self, jobs: Sequence[Job], steps: Sequence[Step], usage: Usage) -> object:
        """All steps as one answer."""


class ChatReply:
    """A chat completion."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def opening(self, jobs: Sequence[Job]) -> list[object]:
        """The role of each choice."""
        delta = Delta(role="assistant", content="")
        return [self._chunk((ChunkChoice(index=job.index, delta=delta),)) for job in jobs]

    def chunk(self, step: Step) -> object:
        """A step as a chunk."""
        return self._chunk((ChunkChoice(index=step.index, delta=step.delta, finish_reason=step.finish),))

    def closing(self, usage: Usage) -> list[object]:
        """Usage, if it was asked for."""
        return [self._chunk((), usage)] if self._head.with_usage else []

    def whole(self, jobs: Sequence[Job], steps: Sequence[Step], usage: Usage) -> object:
        """All steps as one answer."""
        choices = tuple(
            ChatChoice(index=job.index, message=one.message(), finish_reason=one.finish)
            for job, one in zip(jobs, _gathered(jobs, steps), strict=True)
        )
        head = self._head
        return ChatCompletion(
            id=f"chatcmpl-{head.id}", created=head.created, model=head.model, choices=choices, usage=usage
        )

    def _chunk(self, choices: tuple[ChunkChoice, ...], usage: Usage | None = None) -> ChatChunk:
        head = self._head
        return ChatChunk(
            id=f"chatcmpl-{head.id}",
            created=head.created,
            model=head.model,
            choices=choices,
            usage=usage or head.no_usage,
        )


class TextReply:
    """A completion of plain text."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def opening(self, jobs: Sequence[Job]) -> list[object]:
        """Each prompt that is to be repeated."""
        return [self._text((TextChoice(index=job.index, text=job.echo),)) for job in jobs if job.echo]

    def chunk(self, step: Step) -> object:
        """A step as a chunk."""
        text = step.delta.content or ""
        return self._text((TextChoice(index=step.index, text=text, finish_reason=step.finish),))

    def closing(self, usage: Usage) -> list[object]:
        """Usage, if it was asked for."""
        return [self._text((), usage)] if self._head.with_usage else []

    def whole(self, jobs: Sequence[Job], steps: Sequence[Step], usage: Usage) -> object:
        """All steps as one answer."""
        choices = tuple(
            TextChoice(index=job.index, text=job.echo + "".join(one.content), finish_reason=one.finish)
            for job, one in zip(jobs, _gathered(jobs, steps), strict=True)
        )
        return self._text(choices, usage)

    def _text(self, choices: tuple[TextChoice, ...], usage: Usage | None = None) -> TextCompletion:
        head = self._head
        return TextCompletion(
            id=f"cmpl-{head.id}", created=head.created, model=head.model, choices=choices, usage=usage or head.no_usage
        )


@dataclass
class _Gathered:
    """Everything that was written in one choice."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, str, list[str]]] = field(default_factory=list)
    finish: Finish = "stop"

    def add(self, step: Step) -> None:
        """One more step."""
        delta = step.delta
        if delta.content:
            self.content.append(delta.content)
        if delta.reasoning_content:
            self.reasoning.append(delta.reasoning_content)
        for call in delta.tool_calls or ():
            if call.id and call.function.name:
                self.calls.append((call.id, call.function.name, []))
            self.calls[call.index][2].append(call.function.arguments)
        self.finish = step.finish or self.finish

    def message(self) -> AssistantMessage:
        """As a message. Without text there is none, if there are calls."""
        calls = tuple(
            Call(id=id, function=Called(name=name, arguments="".join(arguments))) for id, name, arguments in self.calls
        )
        return AssistantMessage(
            content="".join(self.content) if self.content or not calls else None,
            reasoning_content="".join(self.reasoning) or UNSET,
            tool_calls=calls or UNSET,
        )


def _gathered(jobs: Sequence[Job], steps: Sequence[Step]) -> list[_Gathered]:
    choices = {job.index: _Gathered() for job in jobs}
    for step in steps:
        choices[step.index].add(step)
    return list(choices.values())
