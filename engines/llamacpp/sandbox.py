"""Where chat templates run: no way out of Jinja, no endless loop, no operation that takes all memory in one go.

Time is checked in every turn of a loop and in every call, lengths before every operation that makes something longer,
and everything that is made is counted. A template can still use all of a `Meter`'s time and memory, plus that of the
one operation that exceeds them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

import jinja2
import jinja2.runtime
import jinja2.sandbox

from engines.llamacpp.template_bounds import check_binary, check_filter, check_method
from engines.llamacpp.template_globals import GenerationBlocks, to_json
from engines.llamacpp.template_meter import Meter
from engines.llamacpp.template_sizes import checked, size
from engines.llamacpp.template_tree import ADDED, APPENDED, COMPARED, JOINED, MADE, TIMED, WRITTEN, rewritten

METER = " meter"
"""Name of the `Meter` among a template's variables; with a space, so that no template can use it."""

_LARGE_CHARS = 64 * 1024
T = TypeVar("T")

_LEFT_OUT = frozenset({"pprint", "striptags", "urlize", "wordcount", "wordwrap", "xmlattr"})
"""Filters for web pages, which go through a text with Python code for seconds."""

_ITERATING = frozenset(
    {
        *("list", "map", "reject", "rejectattr", "select", "selectattr", "batch", "slice"),
        *("sort", "unique", "groupby", "min", "max", "sum", "join", "random"),
    }
)
"""Filters that make an object of each character of a text."""

_COMPARING = frozenset(
    {
        *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<=", "le"),
        *("in", "lower", "upper"),
    }
)
"""Tests that look into their arguments, however deep."""

_METHODS: Final[Mapping[type, frozenset[str]]] = {
    str: frozenset(
        {
            *("capitalize", "casefold", "center", "count", "endswith", "expandtabs", "find", "format", "format_map"),
            *("index", "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
            *("isprintable", "isspace", "istitle", "isupper", "join", "ljust", "lower", "lstrip", "partition"),
            *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip"),
            *("split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "zfill"),
        }
    ),
    int: frozenset({"bit_length"}),
    float: frozenset({"is_integer"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
}
"""What templates may call on Python's own values; the rest makes bytes, or things of any size."""


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", GenerationBlocks],
            finalize=_written,
        )
        filters = {name: function for name, function in self.filters.items() if name not in _LEFT_OUT}
        self.filters = {name: _metered(name, function) for name, function in filters.items()}
        self.filters |= {"tojson": _json}
        self.filters |= {TIMED: _timed, MADE: _made, COMPARED: _compared, WRITTEN: _written}
        self.filters |= {JOINED: _joined, APPENDED: _appended, ADDED: _added}
        self.tests |= {name: _comparing(cast(Any, self.tests[name])) for name in _COMPARING}
        del self.globals["lipsum"]

    def compiled(self, source: str) -> jinja2.Template:
        """A template in which all this is done. Raises what Jinja and Python's compiler raise."""
        tree = rewritten(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, checked(argument) if isinstance(argument, tuple) else argument)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        meter = __context[METER]
        meter.check()
        meter.holds(len(args) + len(kwargs))
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja puts its own in the place of `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = tuple(_listed(args, meter))
            check_method(method.__name__, (owner, *args), _own(kwargs))
        elif isinstance(__obj, jinja2.runtime.LoopContext):
            args = tuple(_timed(__context, items) for items in args)
        elif not isinstance(__obj, (jinja2.runtime.Macro, types.FunctionType)):
            args = tuple(_listed(args, meter))
            for value in (owner if isinstance(owner, (list, tuple)) else (), *args, *_own(kwargs).values()):
                checked(value)
                if isinstance(__obj, type) and isinstance(value, (list, tuple, dict)):
                    meter.holds(len(value))
        result = super().call(__context, __obj, *args, **kwargs)
        meter.made(result, inside=True)
        if isinstance(owner, str) and isinstance(result, (list, tuple)):
            meter.made(owner)  # its pieces
        return result

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """See Jinja. Refuses what would become too large."""
        if operator == "+":
            left, right = _present(left, right), _present(right, left)
        check_binary(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        context[METER].made(result)
        return result


def _present(value: Any, beside: Any) -> Any:
    """No text in place of what is not there, beside a text, as in llama.cpp."""
    return "" if isinstance(value, jinja2.Undefined) and isinstance(beside, str) else value


@jinja2.pass_context
def _timed(context: jinja2.runtime.Context, items: Iterable[object]) -> Iterator[object]:
    meter = context[METER]
    for item in items:
        meter.check()
        yield item


@jinja2.pass_context
def _joined(context: jinja2.runtime.Context, parts: Sequence[object]) -> str:
    text = "".join(map(str, checked(parts)))
    context[METER].made(text)
    return text


@jinja2.pass_context
def _appended(context: jinja2.runtime.Context, parts: list[Any]) -> str:
    checked(parts)
    text = "".join(map(str, parts))
    if isinstance(parts[0], str):
        context[METER].made_from(parts, text)
    return text


@jinja2.pass_context
def _added(context: jinja2.runtime.Context, parts: list[Any]) -> Any:
    if all(isinstance(part, str) for part in parts):
        return _appended(context, parts)
    sandbox = cast(Sandbox, context.environment)
    return functools.reduce(lambda left, right: sandbox.call_binop(context, "+", left, right), parts)


@jinja2.pass_context
def _made(context: jinja2.runtime.Context, value: object) -> object:
    context[METER].made(value)
    return value


@jinja2.pass_context
def _compared(context: jinja2.runtime.Context, value: T) -> T:
    if isinstance(value, str) and len(value) < _LARGE_CHARS:
        return value
    context[METER].check()
    return checked(value)


@jinja2.pass_context
def _written(context: jinja2.runtime.Context, value: object) -> object:
    context[METER].count(size(checked(value)))
    return value


@jinja2.pass_context
def _json(context: jinja2.runtime.Context, value: object, *args: Any, **kwargs: Any) -> str:
    meter = context[METER]
    check_filter("tojson", (value, *args), kwargs)
    parts = []
    for part in to_json(value, *args, **kwargs):
        meter.check()
        meter.made(part)
        parts.append(part)
    return "".join(parts)


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result is counted, and which is refused if that would be too long."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @functools.wraps(function)
    def metered(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context[METER]
        meter.check()
        value, *args = _listed((value, *args), meter)  # type: ignore[assignment]  # a list does as well
        if isinstance(value, str) and name in _ITERATING:
            meter.holds(len(value))
        check_filter(name, (value, *args), kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        own = [] if wants is None else [first[wants]]
        result = function(*own, meter.items(value) if name == "sum" else value, *args, **kwargs)
        if result is not value and name not in ("default", "d", "first", "last", "attr", "random"):
            meter.made(result, inside=True)
        return result

    return jinja2.pass_context(metered)


def _comparing(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def comparing(context: jinja2.runtime.Context, *args: object) -> Any:
        return function(*(_compared(context, value) for value in args))

    return jinja2.pass_context(comparing)


def _listed(values: Iterable[Any], meter: Meter) -> Iterator[Any]:
    """What is iterated once as lists, where a size matters."""
    for value in values:
        yield list(meter.items(value)) if isinstance(value, Iterator) else value


def _own(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments that the template wrote; Jinja adds the variables of a loop."""
    return {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
