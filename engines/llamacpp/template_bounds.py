"""Pure: how long the result of a template's operation can become, from what it is given, before it is made.

Each bound is the length of the result, or slightly more; none multiplies what the operation does not multiply. The
units are those of `template_sizes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from engines.llamacpp.template_sizes import ITEM_CHARS, MAX_CHARS, checked, depth, limit, refuse, size

MAX_BITS = 4096
"""Most bits of a whole number."""

_TEXTS = (str, list, tuple)
_MOST_DIGITS = 1000  # behind a decimal point
_MOST_NUMERALS = 64 * 1024  # of a text that is to become a number
_SLOW = 16  # operations that go through a text with Python code
_SORTING = 8
_COMPARED = 64  # characters that C compares in the time in which it makes one
_FIELD_CHARS = 64
_MOST_PARTS = 100  # of the path of an attribute
_FLOAT_CHARS = 400
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_NUMERAL = re.compile(r"\d+")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")


def check_filter(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a filter's call whose result could become too long."""
    _check(_FILTERS.get(name), args, kwargs)
    place = _PATHS.get(name)
    path = kwargs.get("attribute") if place is None or len(args) <= place else args[place]
    if isinstance(path, str) and path.count(".") + path.count(",") > _MOST_PARTS:
        refuse()


def check_method(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """The same for a method of a text, which comes first among ``args``."""
    _check(_METHODS.get(name), args, kwargs)


def check_binary(operator: str, left: Any, right: Any) -> None:
    """The same for ``+ * ** %``."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            refuse()
    elif operator == "+":
        limit(_length(left) + _length(right))
    elif operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, _TEXTS) and isinstance(times, int):
                limit(_length(text) * times)
    elif operator == "%" and isinstance(left, str):
        keyed = isinstance(right, Mapping)
        values = tuple(right.values()) if keyed else right if isinstance(right, tuple) else (right,)
        limit(_percent_chars(left, values, keyed=keyed))


def _check(bound: Callable[..., int] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if bound is not None:
        limit(bound(*args, **kwargs))
        return
    for value in (*args, *kwargs.values()):
        checked(value)


def _length(value: object) -> int:
    """The length of the value itself, without what is nested in it."""
    if isinstance(value, str):
        return len(value)
    return ITEM_CHARS * len(value) if isinstance(value, _TEXTS) else 0


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _lines(text: str) -> int:
    return 1 + sum(map(text.count, _LINE_ENDS))


def _unbounded(*_: object, **__: object) -> int:
    """The result is never longer than one of the arguments, or than what is made of a single item."""
    return 0


def _slow(value: object, *_: object, **__: object) -> int:
    return size(value) * _SLOW


def _sorting(value: object, *_: object, **__: object) -> int:
    return size(value) * _SORTING


def _replace(text: object, old: object, new: object, count: int | None = None) -> int:
    checked(text)
    if not (isinstance(text, str) and isinstance(old, str) and isinstance(new, str)):
        return size(text) * (size(new) + 1)
    found = text.count(old) if old else len(text) + 1
    if isinstance(count, int) and count >= 0:
        found = min(found, count)
    return len(text) + found * max(0, len(new) - len(old))


def _joined(items: object, d: object = "", *_: object, **__: object) -> int:
    return size(items) + size(d) * (len(items) if isinstance(items, Collection) else 0)


def _joined_by_method(separator: str, items: object) -> int:
    return _joined(items, separator)


def _widened(text: object, width: int = 80, *_: object, **__: object) -> int:
    return max(size(text), _count(width))


def _tabs(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * _count(tabsize)


def _indented(text: object, width: int | str = 4, *_: object, **__: object) -> int:
    lines = _lines(text) if isinstance(text, str) else 1
    return size(text) + lines * (ITEM_CHARS + (width if isinstance(width, int) else size(width)))


def _json(
    value: object, ensure_ascii: object = False, indent: object = None, separators: Any = None, **_: object
) -> int:
    checked(value)
    chars = size(value)
    width = max(0, indent) if isinstance(indent, int) else size(indent)
    return chars + chars // ITEM_CHARS * ((depth(value) * width if indent is not None else 0) + size(separators))


def _batches(value: object, linecount: int, *_: object, **__: object) -> int:
    return ITEM_CHARS * _count(linecount)


def _slices(value: object, slices: int, *_: object, **__: object) -> int:
    return ITEM_CHARS * _count(slices)


def _rounded(value: object, precision: int = 0, method: object = None) -> int:
    return 0 if abs(precision) <= _MOST_DIGITS else MAX_CHARS + 1


def _number(value: object, *_: object, **__: object) -> int:
    return 0 if not isinstance(value, str) or len(value) <= _MOST_NUMERALS else MAX_CHARS + 1


def _searched(text: object, part: object = None, *_: object, **__: object) -> int:
    """The worst case of a search from the end, or of finding where stripping ends."""
    return size(text) * size(part) // _COMPARED if part is not None else 0


def _pieces_from_the_end(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    return max(_searched(text, sep), _pieces(text, sep, maxsplit))


def _pieces(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    count = text.count(sep) if sep else len(text) // 2
    if maxsplit >= 0:
        count = min(count, maxsplit)
    return len(text) + ITEM_CHARS * (count + 1)


def _split_lines(text: str, *_: object, **__: object) -> int:
    return len(text) + ITEM_CHARS * _lines(text)


def _percent_filter(text: object, /, *args: object, **kwargs: object) -> int:
    return _percent_chars(text, tuple(kwargs.values()) or args, keyed=bool(kwargs)) if isinstance(text, str) else 0


def _percent_chars(text: str, values: Sequence[object], *, keyed: bool) -> int:
    """Of ``text % values``; with keys, a value may be written many times."""
    sizes = list(map(size, values))
    fields = text.count("%")
    chars = fields * max(sizes, default=0) if keyed else sum(sizes)
    if "*" in text:
        chars += sum(abs(value) for value in values if isinstance(value, int))
    return _format_chars(text, fields, values) + chars


def _braces(text: str, /, *args: object, **kwargs: object) -> int:
    """Of ``text.format(...)``."""
    values = (*args, *kwargs.values())
    fields = text.count("{")
    chars = fields * max(map(size, values), default=0)
    if _NESTED_FIELD.search(text):  # a width whose digits come from anywhere
        digits = max(map(len, _NUMERAL.findall(text)), default=0)
        digits += fields * max((len(str(value)) for value in values if isinstance(value, (str, int))), default=0)
        chars += 10 ** min(digits, len(str(MAX_CHARS)))
    return _format_chars(text, fields, values) + chars + fields * _FIELD_CHARS


def _brace_map(text: str, mapping: Any) -> int:
    return _braces(text, **mapping)


def _format_chars(text: str, fields: int, values: Iterable[object]) -> int:
    """What a format writes besides its values: itself, every width in it, and numbers at their longest."""
    longest = len(str(MAX_CHARS))
    widths = sum(int(numeral[:longest]) for numeral in _NUMERAL.findall(text))
    floats = fields * _FLOAT_CHARS if any(isinstance(value, float) for value in values) else 0
    return len(text) + widths + floats


_FILTERS: Final[Mapping[str, Callable[..., int]]] = {
    **dict.fromkeys(("length", "count", "first", "last", "default", "d", "list", "reverse", "attr"), _unbounded),
    **dict.fromkeys(("map", "select", "reject", "selectattr", "rejectattr", "items", "random"), _unbounded),
    **dict.fromkeys(("title", "urlencode"), _slow),
    **dict.fromkeys(("sort", "unique", "groupby", "dictsort", "min", "max"), _sorting),
    **dict.fromkeys(("int", "float"), _number),
    "batch": _batches,
    "center": _widened,
    "format": _percent_filter,
    "indent": _indented,
    "join": _joined,
    "replace": _replace,
    "round": _rounded,
    "slice": _slices,
    "tojson": _json,
    "trim": _searched,
}

_PATHS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("selectattr", "rejectattr", "groupby", "sum"), 1),
    **dict.fromkeys(("unique", "min", "max", "join"), 2),
    "sort": 3,
}
"""Which argument, by position, is the path of an attribute."""

_METHODS: Final[Mapping[str, Callable[..., int]]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _widened),
    **dict.fromkeys(("lstrip", "rfind", "rindex", "rpartition", "rstrip", "strip"), _searched),
    "expandtabs": _tabs,
    "format": _braces,
    "format_map": _brace_map,
    "join": _joined_by_method,
    "replace": _replace,
    "rsplit": _pieces_from_the_end,
    "split": _pieces,
    "splitlines": _split_lines,
}
