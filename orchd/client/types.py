"""What the client takes and yields besides the wire structs of `orchd.schemas`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from orchd import schemas


class TaskOptions(TypedDict, total=False):
    """Everything a task may carry besides its prompt. None is the same as leaving a field out."""

    pool_id: str | None
    model_ref: str | None
    priority: schemas.Priority | Literal["interactive", "batch"] | None
    chat_template_kwargs: Mapping[str, bool | int | float | str] | None
    json_schema: Mapping[str, Any] | bool | None
    reasoning: bool | None
    max_tokens: int | None
    stop: Sequence[str] | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    ignore_eos: bool | None


class Health(schemas.Health, frozen=True, kw_only=True):
    """What the server says of itself."""

    ready: bool = False
    """Every pool can start tasks; perhaps not on every replica, and then the status is `degraded`."""


class Started(schemas.Started, frozen=True, kw_only=True):
    """The task left the queue. To resume after it, follow with ``last_event_id=event.event_id``."""

    event_id: str | None = None


class Token(schemas.Token, frozen=True, kw_only=True):
    """A piece of the answer."""

    event_id: str | None = None

    @property
    def text(self) -> str:
        """The piece."""
        return self.t


class Reasoning(schemas.Reasoning, frozen=True, kw_only=True):
    """A piece of what the model thinks before it answers; only for a task with ``reasoning=True``."""

    event_id: str | None = None

    @property
    def text(self) -> str:
        """The piece."""
        return self.r


class AnyToken(schemas.Wire, frozen=True, kw_only=True):
    """Data of a ``token`` event before it is known which of the two it is."""

    i: int
    t: str | None = None
    r: str | None = None

    def event(self, event_id: str | None) -> Token | Reasoning:
        """What it is. Raises `ValueError` if it is neither."""
        if self.t is not None:
            return Token(t=self.t, i=self.i, event_id=event_id)
        if self.r is not None:
            return Reasoning(r=self.r, i=self.i, event_id=event_id)
        raise ValueError("a token event without text")


class End(schemas.End, frozen=True, kw_only=True):
    """How the task ended."""

    event_id: str | None = None


Event = Started | Token | Reasoning | End
"""What a task's stream consists of: one `Started`, any number of `Token` and `Reasoning`, one `End`."""
