"""Where chat templates run: no way out of Jinja, no endless loop, no operation that takes all memory in one go.

Time is looked at in every turn of a loop and in every call, size before every operation that could multiply it. What a
template can still do is to take `Deadline`'s time, and a few times `MAX_CHARS` of memory.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox
import jinja2.visitor

from engines.errors import InvalidPrompt

MAX_CHARS = 16 * 2**20
"""Longest text that an operation may make, in characters."""

MAX_BITS = 4096
"""Of whole numbers."""

DEADLINE = " deadline"
"""Name of the `Deadline` among a template's variables; with a space, so that no template can use it."""

_TIMED, _JOINED = " timed", " joined"
_TEXTS = (str, list, tuple)
_ITEM_CHARS = 16
_MULTIPLYING = frozenset(
    {
        *("batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust"),
        *("slice", "tojson", "translate", "wordwrap", "zfill"),
    }
)
"""Filters and methods whose result can be as long as the product of what they are given."""

_WIDTH = re.compile(r"\d{6}")
T = TypeVar("T")


class Deadline:
    """Processor time of one rendering, from now on, on this thread."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._end_s = time.thread_time() + limit_s

    def check(self) -> None:
        """Raise `InvalidPrompt` once it is over."""
        if time.thread_time() > self._end_s:
            raise InvalidPrompt(f"the model's chat template took longer than {self._limit_s:g} s; send prompt instead")


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], finalize=_checked
        )
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {_TIMED: _timed, _JOINED: _joined}
        del self.globals["lipsum"]

    def compiled(self, source: str) -> jinja2.Template:
        """A template with its loops timed and its texts measured. Raises what Jinja and Python's compiler raise."""
        tree = _Limits().visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __context[DEADLINE].check()
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja puts its own in the place of `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            name = method.__name__
            args = tuple(_drawn(name, args))
            _check_growth(name, [owner, *args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """See Jinja. Refuses what would become too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                _refuse()
        elif operator == "+":
            _checked((left, right))
        elif operator == "*" and isinstance(left, _TEXTS) != isinstance(right, _TEXTS):
            _check_product([left, right])
        elif operator == "%" and isinstance(left, str):
            _check_growth("format", [left, *(right if isinstance(right, tuple) else [right])])
        return super().call_binop(context, operator, left, right)


class _Limits(jinja2.visitor.NodeTransformer):
    """Loops look at the time; ``~`` becomes a filter, because Jinja lets nobody intercept it."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = jinja2.nodes.Filter(node.iter, _TIMED, [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
        return jinja2.nodes.Filter(parts, _JOINED, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _timed(context: jinja2.runtime.Context, items: Iterable[object]) -> Iterator[object]:
    for item in items:
        context[DEADLINE].check()
        yield item


def _joined(parts: Sequence[object]) -> str:
    return "".join(map(str, _checked(parts)))


def _bounded(name: str, function: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(function)  # with what Jinja noted on it
    def bounded(*args: Any, **kwargs: Any) -> T:
        args = tuple(_drawn(name, args))
        _check_growth(name, [*args, *kwargs.values()])
        return function(*args, **kwargs)

    return bounded


def _drawn(name: str, values: Iterable[Any]) -> Iterator[Any]:
    """Iterators as lists, where their size matters."""
    for value in values:
        yield list(value) if name in _MULTIPLYING and isinstance(value, Iterator) else value


def _check_growth(name: str, values: Sequence[object]) -> None:
    """Refuse arguments of a filter or method from which too much could be made."""
    if name in ("format", "format_map") and any(isinstance(text, str) and _WIDTH.search(text) for text in values):
        _refuse()
    if name in _MULTIPLYING:
        _check_product(values)
    else:
        for value in values:
            _checked(value)


def _check_product(values: Sequence[object]) -> None:
    product = 1
    for value in values:
        product *= max(1, value if isinstance(value, int) else _size(value))
        if product > MAX_CHARS:
            _refuse()


def _checked(value: T) -> T:
    if _size(value) > MAX_CHARS:
        _refuse()
    return value


def _size(value: object) -> int:
    """Characters of a value written out, roughly; what is in it twice counts twice.

    Stops counting once it is too much, so that no nesting takes long.
    """
    if isinstance(value, str):
        return len(value)
    total, rest = 0, [value]
    while rest and total <= MAX_CHARS:
        one = rest.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, Collection) and not isinstance(one, jinja2.runtime.Context):  # which has no length
            total += _ITEM_CHARS * len(one)
            if total <= MAX_CHARS:
                rest.extend(one)
                if isinstance(one, dict):
                    rest.extend(one.values())
        else:
            total += one.bit_length() if isinstance(one, int) else 1
    return total


def _refuse() -> NoReturn:
    raise InvalidPrompt(
        f"the model's chat template builds texts of more than {MAX_CHARS} characters, or huge numbers; "
        "send prompt instead"
    )
