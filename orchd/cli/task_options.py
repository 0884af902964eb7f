"""A task's options, from the command line's text to the types of the task's fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from orchd.client import TaskOptions
from orchd.errors import ConfigError
from orchd.schemas import TaskRequest
from orchd.settings.strict import convert_value

_WAIT = Annotated[float, Meta(ge=0, le=86400 * 365)]


def task_options(*, pool: str | None, template_arg: Sequence[str] | None, **fields: object) -> TaskOptions:
    """The options; `fields` have the names of a task's. Raises `ConfigError` for a value that its field cannot have."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(TaskRequest)}
    options: Any = {
        name: value if value is None else convert_value(value, kinds[name], f"--{name.replace('_', '-')}")
        for name, value in fields.items()
    }
    options["pool_id"] = pool
    options["chat_template_kwargs"] = dict(map(_template_argument, template_arg)) if template_arg else None
    return options  # type: ignore[no-any-return]  # each value was converted to its field's type


def wait_seconds(text: str) -> float:
    """``--wait``. Raises `ConfigError`."""
    return float(convert_value(text, _WAIT, "--wait"))


def _template_argument(option: str) -> tuple[str, bool | int | float | str]:
    """Name and value; true, false and numbers are what they look like, anything else is text."""
    name, equals, text = option.partition("=")
    if not equals:
        raise ConfigError(f"--template-arg: {option!r} is not NAME=VALUE, such as enable_thinking=false")
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return name, text
    return name, value if isinstance(value, (bool, int, float)) else text
