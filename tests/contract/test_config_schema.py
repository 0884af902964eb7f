"""The configuration's JSON Schema and its page are what the structs say, and the schema agrees with the loader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from orchd.errors import ConfigError
from orchd.settings.config import ConfigFile
from orchd.settings.sources import load
from tests.contract.forbidden import CONFIG_KEYS
from tools import config_schema

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA: dict[str, Any] = json.loads(config_schema.SCHEMA.read_text())

RIGHT = (
    "",
    "[server]\nport = 0\nallowed_hosts = ['orchd.lan']\nallowed_origins = []",
    "[server]\nallowed_hosts = ['orchd.lan:8737', '[fd00::1]', 'fd00::1', 'box.']",
    "[server]\nallowed_origins = ['tauri://localhost', 'null', 'app://.', 'http://[::1]:3000']",
    "[queue]\ncapacity = 1\n[tasks]\nretention_s = 0\n[workers]\nstall_s = 1.5",
    "[models]\nroots = ['~/models']\n[[pools]]\nid = 'a'\nmodel = 'a.gguf'\n[[pools]]\nid = 'b'\nmodel = 'b.gguf'",
    "[[pools]]\nmodel = 'a'\ndevices = ['cpu', 'cpu']\ncache_type_k = 'q8_0'\nmmap = false",
    "[[pools]]\nmodel = 'a'\ndevices = 'auto'\nflash_attn = 'on'\nreload = 'replace'",
)
WRONG = (
    "[server]\nport = 65536",
    "[server]\nport = '80'",
    "[server]\nhost = ''",
    "[server]\nallowed_origins = ['*']",
    "[server]\nallowed_origins = ['https://chat.lan/']",
    "[server]\nallowed_origins = ['localhost']",
    "[server]\nallowed_origins = ['https://bücher.lan']",
    "[server]\nallowed_hosts = ['http://orchd.lan']",
    "[server]\nallowed_hosts = ['*.lan']",
    "[server]\nallowed_hosts = ['me@orchd.lan']",
    "[server]\nallowed_hosts = ['orchd.lan:']",
    "[server]\nallowed_hosts = ['bücher.lan']",
    "[server]\nallowed_hosts = ['[fd00::1']",
    "[queue]\ncapacity = 0",
    "[queue]\ncapacity = 1.5",
    "[workers]\nstall_s = 0",
    "pools = []",
    "[[pools]]\nmodel = 'a'\nid = 'a b'",
    "[[pools]]\nmodel = 'a'\ndevices = []",
    "[[pools]]\nmodel = 'a'\ndevices = ['tpu:0']",
    "[[pools]]\nmodel = 'a'\ncache_type_k = 'q2'",
    *CONFIG_KEYS,
)


def accepted(text: str, folder: Path) -> bool:
    path = folder / "orchd.toml"
    path.write_text(text)
    try:
        load(config_path=path, flags={}, environ={}, cwd=folder)
    except ConfigError:
        return False
    return True


def parsed(text: str) -> Any:
    return tomllib.loads(text)


@pytest.mark.parametrize("path", config_schema.files(), ids=lambda path: path.name)
def test_a_generated_file_is_fresh(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == config_schema.files()[path], "run `make schema`"


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert set(SCHEMA["properties"]) == set(ConfigFile.__struct_fields__) == set(config_schema.SECTIONS)


def test_every_key_is_described() -> None:
    for name, struct in SCHEMA["$defs"].items():
        for key, node in struct["properties"].items():
            assert node["description"].endswith("."), f"{name}.{key}"


@pytest.mark.parametrize("text", RIGHT)
def test_what_the_loader_takes_the_schema_takes(tmp_path: Path, text: str) -> None:
    assert accepted(text, tmp_path)
    Draft202012Validator(SCHEMA).validate(parsed(text))


@pytest.mark.parametrize("text", WRONG)
def test_what_the_loader_refuses_the_schema_refuses(tmp_path: Path, text: str) -> None:
    assert not accepted(text, tmp_path)
    assert not Draft202012Validator(SCHEMA).is_valid(parsed(text))


def test_the_page_has_every_key() -> None:
    page = config_schema.PAGE.read_text()
    for struct in SCHEMA["$defs"].values():
        for key in struct["properties"]:
            assert f"| `{key}` |" in page


def test_the_pages_own_example_is_right(tmp_path: Path) -> None:
    example = config_schema.PAGE.read_text().partition("```toml\n")[2].partition("```")[0]
    assert example.startswith("#:schema ")
    assert accepted(example, tmp_path)
    Draft202012Validator(SCHEMA).validate(parsed(example))
