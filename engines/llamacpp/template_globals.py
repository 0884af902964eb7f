"""The variables and functions that a chat template has besides the messages, as in ``transformers`` and llama.cpp."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any, Final, NoReturn

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension

MAX_REFUSAL_CHARS = 300
"""Longest sentence of a template's own that is passed on."""

MAX_DATE_CHARS = 1000
"""Longest format of a date: C makes room for up to 256 times as much."""

RESERVED: Final = frozenset(
    {
        *("messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "tools", "documents"),
        *("raise_exception", "strftime_now", "range", "dict", "namespace", "cycler", "joiner"),
        *("loop", "self", "caller", "varargs", "kwargs"),
    }
)
"""Names that no task may give another meaning."""


class Refusal(jinja2.TemplateError):
    """What a template says to those whose messages it does not take."""


def constants(*, bos: str, eos: str, unk: str) -> dict[str, object]:
    """Names that mean the same in every rendering."""
    return {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
    }


def defaults() -> dict[str, object]:
    """Variables as llama-server sets them where the request says nothing else.

    What the model thought stays in the conversation: then each turn begins as the last one ended.
    """
    now = _now()
    return {
        "enable_thinking": True,
        "preserve_thinking": True,
        "clear_thinking": False,
        "drop_thinking": False,
        "truncate_history_thinking": False,
        "date_string": now.strftime("%d %b %Y"),
        "datetime": now.strftime("%b %d %Y"),
    }


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Iterator[str]:
    """The filter ``tojson`` of ``transformers``, in parts: JSON as it is, where Jinja's own would escape HTML."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_undefined
    )
    return encoder.iterencode(value) if indent is not None else iter((encoder.encode(value),))


class GenerationBlocks(Extension):
    """``{% generation %}…{% endgeneration %}``: what the model itself wrote, which counts in training alone."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's name and type

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's body in place of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _now() -> datetime.datetime:
    return datetime.datetime.now()  # the template wants local time


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE_CHARS:
        raise ValueError("a date's format of so many characters")
    return _now().strftime(form)


def _undefined(value: object) -> Any:
    """Null for what is not there, as in llama.cpp: templates take `functions` and its like for granted."""
    if isinstance(value, jinja2.Undefined):
        return None
    raise TypeError(f"a {type(value).__name__} is not JSON")


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(" ".join(str(message)[:MAX_REFUSAL_CHARS].split()))
