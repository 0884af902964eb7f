"""What the server says, in the words of someone who typed a command: its options instead of the API's fields."""

from __future__ import annotations

import math
import re
from typing import Final

from orchd.client.errors import Busy, NotReady
from orchd.errors import OrchdError

_OPTIONS: Final = {
    "pool_id": "--pool",
    "model_ref": "--model-ref",
    "max_tokens": "--max-tokens",
    "chat_template_kwargs": "--template-arg",
    "json_schema": "--json-schema",
}
_FIELD: Final = re.compile(rf"\b({'|'.join(_OPTIONS)})\b")
_PROMPT: Final = re.compile(r"send prompt instead( of messages)?")
_LONGEST_S: Final = 60


def of_run(error: OrchdError) -> str:
    """What `orchd run` says of an error."""
    if isinstance(error, Busy) and error.pause_s is not None:
        pause_s = max(1, math.ceil(error.pause_s))
        wait_s = max(_LONGEST_S, 2 * pause_s)
        return f"the queue is full; there should be room in {duration(pause_s)}: let orchd wait with --wait {wait_s}"
    message = _PROMPT.sub("use --raw", str(error))
    message = _FIELD.sub(lambda found: _OPTIONS[found[1]], message)
    if isinstance(error, NotReady) and error.pause_s is not None:
        message = f"{message.rstrip('.')}, or let orchd wait with --wait {_LONGEST_S}"
    return message


def what_is_wrong(message: str) -> str:
    """A message without what to do about it."""
    return message.partition(";")[0].rstrip(".")


def tasks(count: int) -> str:
    """A number of tasks."""
    return "1 task" if count == 1 else f"{count} tasks"


def duration(seconds: float) -> str:
    """Seconds for people, rounded up."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
