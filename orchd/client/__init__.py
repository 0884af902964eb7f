"""A small async client for orchd.

    async with Client() as client:
        async for text in client.run("Once upon a time"):
            print(text, end="", flush=True)

It repeats what is safe to repeat and nothing else: a submit whose answer was lost is sent again under the
same id, and a stream that breaks is taken up after the last event that arrived. A client belongs to one event
loop. Without a URL and a token it finds those of this account's server by itself.
"""

from orchd.client.client import Client, raise_if_failed
from orchd.client.errors import (
    BadAnswer,
    Busy,
    ClientError,
    Forbidden,
    InvalidRequest,
    NotFound,
    NotReachable,
    NotReady,
    Refused,
    ReloadFailed,
    ReloadInProgress,
    TaskCancelled,
    TaskFailed,
    Unauthorized,
)
from orchd.client.transport import DEFAULT_URL
from orchd.client.types import End, Event, Health, Reasoning, Started, TaskOptions, Token
from orchd.schemas import (
    Accepted,
    ErrorBody,
    Message,
    PoolHealth,
    Priority,
    Reloaded,
    ReplicaHealth,
)

__all__ = [
    "DEFAULT_URL",
    "Accepted",
    "BadAnswer",
    "Busy",
    "Client",
    "ClientError",
    "End",
    "ErrorBody",
    "Event",
    "Forbidden",
    "Health",
    "InvalidRequest",
    "Message",
    "NotFound",
    "NotReachable",
    "NotReady",
    "PoolHealth",
    "Priority",
    "Reasoning",
    "Refused",
    "ReloadFailed",
    "ReloadInProgress",
    "Reloaded",
    "ReplicaHealth",
    "Started",
    "TaskCancelled",
    "TaskFailed",
    "TaskOptions",
    "Token",
    "Unauthorized",
    "raise_if_failed",
]
