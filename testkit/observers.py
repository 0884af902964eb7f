"""An `orchd.observer.Observer` for servers that nobody watches."""

from __future__ import annotations

from collections.abc import Callable

from orchd.observer import Summary


class Quiet:
    """Says nothing."""

    def loading(self, label: str, share: float) -> None: ...
    def loaded(self, label: str, seconds: float) -> None: ...
    def ready(self, summary: Summary) -> None: ...
    def stopping(self, running: int) -> None: ...
    def stopped(self) -> None: ...


class WhenReady(Quiet):
    """Tells one function that the server is ready, and nothing else."""

    def __init__(self, tell: Callable[[Summary], object]) -> None:
        self._tell = tell

    def ready(self, summary: Summary) -> None:
        self._tell(summary)
