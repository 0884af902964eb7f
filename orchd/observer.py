"""How a server reports that it starts, serves and stops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol

_log = logging.getLogger(__name__)

P = ParamSpec("P")


@dataclass(frozen=True)
class PoolSummary:
    """One pool, ready or without a model.

    Attributes:
        id: The pool.
        model_id: The model it serves.
        replicas: The device of each replica, such as ``gpu:0`` or ``cpu``.
        slots: Tasks that run at the same time on each replica.
        ctx: Tokens per slot.
        failure: Why it is not served, in one sentence; None if it is.
    """

    id: str
    model_id: str
    replicas: tuple[str, ...]
    slots: int
    ctx: int
    failure: str | None = None


@dataclass(frozen=True)
class Summary:
    """A server that is ready.

    Attributes:
        url: Where it listens.
        token_origin: Where the token is, never the token: "in /home/me/.local/state/orchd/token".
        token_file: The file to read it from, if it is in one.
        pools: In the order of the configuration; at least one.
    """

    url: str
    token_origin: str
    token_file: str | None
    pools: tuple[PoolSummary, ...]


class Observer(Protocol):
    """Called on the event loop's thread. A label names a replica, as in "default/0 SmolLM2-135M on cpu"."""

    def loading(self, label: str, share: float) -> None:
        """A model is being loaded; `share` of it, 0.0 to 1.0, is done."""

    def loaded(self, label: str, seconds: float) -> None:
        """It is loaded, and took so long."""

    def ready(self, summary: Summary) -> None:
        """Every pool that can serve does, and at least one can."""

    def stopping(self, running: int) -> None:
        """Nothing more is admitted; `running` tasks may still finish."""

    def stopped(self) -> None:
        """All is closed; the process ends."""


class Guarded:
    """An observer that cannot do harm: what it raises goes to the log and nowhere else.

    `SystemExit` too: Rich raises it where a pipe's reader has left.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def loading(self, label: str, share: float) -> None:
        """See `Observer`."""
        self._tell(self._observer.loading, label, share)

    def loaded(self, label: str, seconds: float) -> None:
        """See `Observer`."""
        self._tell(self._observer.loaded, label, seconds)

    def ready(self, summary: Summary) -> None:
        """See `Observer`."""
        self._tell(self._observer.ready, summary)

    def stopping(self, running: int) -> None:
        """See `Observer`."""
        self._tell(self._observer.stopping, running)

    def stopped(self) -> None:
        """See `Observer`."""
        self._tell(self._observer.stopped)

    @staticmethod
    def _tell(tell: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            tell(*args, **kwargs)
        except (Exception, SystemExit):
            _log.exception("the observer failed; the server continues")
