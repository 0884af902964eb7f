"""Everything orchd refuses or fails at, as one tree. HTTP statuses live in `orchd.http` alone.

OrchdError                          a sentence for a person
├── ConfigError                     names file, key and remedy; ends the process with exit code 2
└── TaskError                       has a `Code`; becomes an error envelope
    ├── InvalidParams               INVALID_PARAMS
    ├── NotFound                    NOT_FOUND
    ├── AdmissionReject             ADMISSION_REJECT, with how long the client should wait
    ├── PoolUnready                 POOL_UNREADY, loading or shutting down
    ├── PoolUnavailable             POOL_UNAVAILABLE, no replica left alive, or not this model
    ├── WorkerReset                 WORKER_RESET, a step of the task failed
    ├── DecodeTimeout               DECODE_TIMEOUT, the task did not finish in time
    ├── ReloadInProgress            RELOAD_IN_PROGRESS
    ├── ReloadFailed                RELOAD_FAILED, the old model still serves
    └── Internal                    INTERNAL
"""

from __future__ import annotations

import enum

UNREADY_RETRY_S = 2.0
"""How long to suggest waiting if no queue's speed says how long it will take."""


class Code(str, enum.Enum):
    """The closed list of codes in an error envelope."""

    INVALID_PARAMS = "INVALID_PARAMS"
    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    RELOAD_IN_PROGRESS = "RELOAD_IN_PROGRESS"
    RELOAD_FAILED = "RELOAD_FAILED"
    ADMISSION_REJECT = "ADMISSION_REJECT"
    INTERNAL = "INTERNAL"
    POOL_UNREADY = "POOL_UNREADY"
    POOL_UNAVAILABLE = "POOL_UNAVAILABLE"
    DECODE_TIMEOUT = "DECODE_TIMEOUT"
    WORKER_RESET = "WORKER_RESET"


class OrchdError(Exception):
    """Base of everything orchd raises on purpose. ``str(error)`` is one sentence that says what would be right."""


class ConfigError(OrchdError):
    """The configuration, a model or a port is not usable as given."""


class TaskError(OrchdError):
    """A request that gets an error envelope instead of what it asked for.

    Attributes:
        code: The envelope's code.
        retry_after_s: Pause before another try, in seconds, where trying again may help.
    """

    code: Code = Code.INTERNAL

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class InvalidParams(TaskError):
    """The request itself is wrong."""

    code = Code.INVALID_PARAMS


class NotFound(TaskError):
    """There is no such task, pool or path."""

    code = Code.NOT_FOUND


class AdmissionReject(TaskError):
    """The queue is full."""

    code = Code.ADMISSION_REJECT


class PoolUnready(TaskError):
    """The pool is loading, reloading without room for two models, or shutting down."""

    code = Code.POOL_UNREADY


class PoolUnavailable(TaskError):
    """No replica of the pool is alive, or no pool serves the model that was asked for."""

    code = Code.POOL_UNAVAILABLE


class WorkerReset(TaskError):
    """The step that carried the task failed and the worker started over."""

    code = Code.WORKER_RESET


class DecodeTimeout(TaskError):
    """The task was not done when its time was over."""

    code = Code.DECODE_TIMEOUT


class ReloadInProgress(TaskError):
    """The pool is already being reloaded."""

    code = Code.RELOAD_IN_PROGRESS


class ReloadFailed(TaskError):
    """The new model could not be loaded; nothing changed."""

    code = Code.RELOAD_FAILED


class Internal(TaskError):
    """A defect in orchd."""

    code = Code.INTERNAL
