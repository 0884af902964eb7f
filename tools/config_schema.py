"""``orchd/orchd.schema.json`` and ``docs/configuration.md`` from the structs in `orchd.settings.config`.

``python -m tools.config_schema`` (``make schema``) writes both; a test fails when either is not what it would write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from orchd.settings.config import ConfigFile

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "orchd" / "orchd.schema.json"
PAGE = ROOT / "docs" / "configuration.md"

SECTIONS = {
    "server": "Where the server listens and who gets in.",
    "queue": "The bounded queue of each pool; when it is full, new tasks are refused (429) and none is dropped.",
    "tasks": "How long tasks and their events are kept.",
    "workers": "The compute threads, one for each device.",
    "models": "Which files a reload over HTTP may use.",
    "pools": "A model, the devices that each hold a replica of it, and the engine's options; one table per pool.",
}
"""What each section is for."""

_HEAD = """\
# Configuration

<!-- Written by `make schema` from orchd/settings/config.py; change that, or the text in tools/config_schema.py. -->

No configuration is required: without a file, `orchd serve` runs one pool, `default`, on the best device it finds, with
the demo model. The file is TOML and strict: an unknown key, a wrong type or a value out of range is an error that names
the file, the key and what would be right. `orchd check` checks it without starting anything.

The file is the first of these that exists: `--config FILE`, `ORCHD_CONFIG`, `./orchd.toml`, `orchd.toml` in the user's
configuration folder (`~/.config/orchd`). Flags override the environment (`ORCHD_` and a key of `[server]` in capitals,
such as `ORCHD_PORT`; lists are comma-separated), the environment overrides the file, and the file overrides the
defaults. Paths in the file are relative to its folder. `model` is required for each pool in the file.

```toml
#:schema /path/to/orchd.schema.json

[server]
port = 8737

[models]
roots = ["~/models"]

[[pools]]
id = "chat"
model = "~/models/qwen2.5-7b-instruct-q4_k_m.gguf"
devices = ["gpu:0", "gpu:1"]
slots = 8
ctx = 8192
```

The first line is for editors (Even Better TOML and others that use Taplo): with it, they complete keys and mark
mistakes. The schema is part of orchd; this prints its path:

    python -c "import importlib.resources as r; print(r.files('orchd') / 'orchd.schema.json')"
"""


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file. TOML has no null, so neither has it."""
    made = msgspec.json.schema(ConfigFile)
    root = made["$defs"].pop("ConfigFile")
    for name, field in root["properties"].items():
        field.pop("default", None)
        field["description"] = SECTIONS[name]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "orchd.toml"}
    whole: dict[str, Any] = _without_null({**head, **{k: v for k, v in root.items() if k != "title"}, **made})
    del whole["$ref"]
    return whole


def _without_null(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_null(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {
        key: _without_null(value)
        for key, value in node.items()
        if not (key == "default" and value is None) and not (key == "required" and value == [])
    }
    if {"type": "null"} in node.get("anyOf", ()):
        kinds = [kind for kind in node.pop("anyOf") if kind != {"type": "null"}]
        node |= kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return node


def page() -> str:
    """The reference in Markdown: a table for each section."""
    root = inspect.type_info(ConfigFile)
    assert isinstance(root, inspect.StructType)
    return _HEAD + "".join(_section(field) for field in root.fields)


def _section(field: inspect.Field) -> str:
    kind = _bare(field.type)
    struct = _bare(kind.item_type) if isinstance(kind, inspect.VarTupleType) else kind
    assert isinstance(struct, inspect.StructType)
    title = f"[[{field.name}]]" if struct is not kind else f"[{field.name}]"
    rows = "".join(_row(key) for key in struct.fields)
    return (
        f"\n## `{title}`\n\n{SECTIONS[field.name]}\n\n"
        f"| key | type | default | range | meaning |\n| --- | --- | --- | --- | --- |\n{rows}"
    )


def _row(field: inspect.Field) -> str:
    default = "" if field.default is None else f"`{_toml(field.default)}`"
    cells = (f"`{field.name}`", _type(field.type), default, _range(field.type), _description(field.type))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _type(kind: inspect.Type) -> str:
    kind = _bare(kind)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_type(part) for part in kind.types if not isinstance(part, inspect.NoneType))
    if isinstance(kind, inspect.VarTupleType):
        return "list of strings"
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f'`"{value}"`' for value in kind.values)
    names = {inspect.IntType: "integer", inspect.FloatType: "number", inspect.BoolType: "boolean"}
    return names.get(type(kind), "string")


def _range(kind: inspect.Type) -> str:
    inner = kind
    while isinstance(inner, inspect.Metadata):
        if expected := (inner.extra or {}).get("expected"):
            return str(expected)
        inner = inner.type
    kind = inner
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        low = f"above {kind.gt}" if kind.gt is not None else f"{kind.ge}"
        return f"{low} to {kind.le}"
    return ""


def _description(kind: inspect.Type) -> str:
    while isinstance(kind, inspect.Metadata):
        if text := (kind.extra_json_schema or {}).get("description"):
            return str(text)
        kind = kind.type
    return ""


def _bare(kind: inspect.Type) -> inspect.Type:
    while isinstance(kind, inspect.Metadata):
        kind = kind.type
    return kind


def files() -> dict[Path, str]:
    """Both files, as they should be."""
    return {SCHEMA: json.dumps(schema(), indent=2, ensure_ascii=False) + "\n", PAGE: page()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
