"""What stands after ``--json-schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def read_schema(text: str) -> dict[str, Any] | bool:
    """A schema that is written out, or that is in a file. Raises `typer.BadParameter`."""
    where = "the text"
    try:
        if text.lstrip()[:1] not in ("{", "") and text != "true":
            where, text = text, Path(text).read_text("utf-8")
        schema = json.loads(text)
    except OSError as error:
        raise _wrong(f"{where!r} cannot be read ({error.strerror}); name a file, or write the schema itself") from None
    except UnicodeDecodeError:
        raise _wrong(f"{where!r} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _wrong(f"{where} is not JSON: {error}") from None
    if not isinstance(schema, dict) and schema is not True:
        raise _wrong(f"{where} is JSON, but not an object or true")
    return schema


def _wrong(message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint="--json-schema")
