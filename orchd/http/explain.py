"""What is wrong with a request's body, as a sentence that names the field and says what would be right."""

from __future__ import annotations

import difflib
import re

import msgspec
from msgspec import inspect

from orchd.errors import InvalidParams
from orchd.schemas import Message, ReloadRequest, StrictWire, TaskRequest

_STRUCTS: tuple[type[StrictWire], ...] = (TaskRequest, Message, ReloadRequest)


def explain(error: Exception, wanted: type[StrictWire]) -> InvalidParams:
    """The refusal of a body that could not be decoded as ``wanted``."""
    if isinstance(error, msgspec.ValidationError):
        return InvalidParams(_sentence(str(error), wanted))
    if isinstance(error, UnicodeDecodeError):
        return InvalidParams("the body is not UTF-8; encode it as UTF-8")
    detail = str(error).removeprefix("JSON is malformed: ").replace("Input data was truncated", "it ends too soon")
    return InvalidParams(f"the body is not JSON: {detail}; send one JSON object")


def _sentence(complaint: str, wanted: type[StrictWire]) -> str:
    """What msgspec says, such as "Invalid UUID - at `$.task_id`", in our words."""
    complaint, _, path = complaint.partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    field = where.rpartition(".")[2].partition("[")[0]
    begin = f"{where}: " if where else ""
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", complaint, re.DOTALL):
        known = (Message if where else wanted).__struct_fields__
        near = difflib.get_close_matches(unknown[1][:64], known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
        return f"{begin}there is no field {_short(unknown[1])}; {remedy}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", complaint):
        return f"{begin}{missing[1]} is missing; give it"
    if enum := re.fullmatch(r"Invalid enum value (.*)", complaint, re.DOTALL):
        return f"{begin}{_short(enum[1])} is not one of {', '.join(_CHOICES[field])}"
    if complaint == "Invalid UUID":
        return f"{begin}not a UUID; send one such as 6f1c9f0e-8a53-4f0b-9d0c-3a1f5c2b7e44, or leave it out"
    if not where:
        return f"the body: {complaint[0].lower()}{complaint[1:]}"
    return f"{begin}{complaint[0].lower()}{complaint[1:]}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _choices(struct: type[StrictWire]) -> dict[str, list[str]]:
    """The values of every field that takes one of a few."""
    kind = inspect.type_info(struct)
    assert isinstance(kind, inspect.StructType)
    choices = {}
    for field in kind.fields:
        if isinstance(field.type, inspect.LiteralType):
            choices[field.name] = [str(value) for value in field.type.values]
        elif isinstance(field.type, inspect.EnumType):
            choices[field.name] = [str(member.value) for member in field.type.cls]
    return choices


_CHOICES = {name: values for struct in _STRUCTS for name, values in _choices(struct).items()}
