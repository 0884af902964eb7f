"""What the client raises. Each message is one sentence that a person can act on.

    ClientError
    ├── NotReachable            nothing answers, or the connection broke and could not be taken up again
    ├── BadAnswer               something answers, but not as orchd does
    ├── Refused                 the server's error envelope, with its status
    │   ├── InvalidRequest      400
    │   ├── Unauthorized        401
    │   ├── Forbidden           403
    │   ├── NotFound            404
    │   ├── ReloadInProgress    409
    │   ├── ReloadFailed        422, the old model still serves
    │   ├── Busy                429, the queue is full
    │   └── NotReady            503
    └── TaskFailed              an accepted task that ended with an error
        └── TaskCancelled       an accepted task that was cancelled before it was done

All of them are `OrchdError`.
"""

from __future__ import annotations

from collections.abc import Mapping

from orchd.errors import Code, OrchdError


class ClientError(OrchdError):
    """Base of everything that `orchd.client` raises on purpose."""


class NotReachable(ClientError):
    """Nothing answers, or the connection broke and could not be taken up again."""


class BadAnswer(ClientError):
    """Something answers, but not as orchd does."""


class Refused(ClientError):
    """The server said no.

    Attributes:
        status: The HTTP status.
        code: The envelope's code.
        message: The envelope's message.
        retry_after_s: The pause asked for before another try (``Retry-After``), where there is one.
        backoff_ms: The same, measured (``X-Backoff-Ms``), where there is one.
    """

    def __init__(
        self,
        *,
        status: int,
        code: Code,
        message: str,
        retry_after_s: float | None = None,
        backoff_ms: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.backoff_ms = backoff_ms

    @property
    def pause_s(self) -> float | None:
        """How long to wait before another try, or None where waiting does not help."""
        return self.retry_after_s if self.backoff_ms is None else self.backoff_ms / 1000


class InvalidRequest(Refused):
    """400: the request itself is wrong."""


class Unauthorized(Refused):
    """401: the token is missing or not the server's."""


class Forbidden(Refused):
    """403: the server does not answer to this host name or origin."""


class NotFound(Refused):
    """404: no such task or pool."""


class ReloadInProgress(Refused):
    """409: the pool is already being reloaded."""


class ReloadFailed(Refused):
    """422: the new model could not be loaded; the old one still serves."""


class Busy(Refused):
    """429: the queue is full."""


class NotReady(Refused):
    """503: loading, shutting down, or no pool serves the model asked for."""


BY_STATUS: Mapping[int, type[Refused]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: ReloadInProgress,
    422: ReloadFailed,
    429: Busy,
    503: NotReady,
}


class TaskFailed(ClientError):
    """An accepted task ended with an error.

    Attributes:
        task_id: The task.
        code: The code of the error in its ``end``; None if it was cancelled.
    """

    def __init__(self, message: str, *, task_id: str, code: Code | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.code = code


class TaskCancelled(TaskFailed):
    """An accepted task was cancelled before it was done, for instance by a server that shuts down."""
