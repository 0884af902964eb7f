"""`orchd serve`: what reaches the server, and what becomes of its exit code."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from orchd.errors import ConfigError
from testkit.stand_in import TOKEN
from tests.cli.shell import one_line, orchd


def serving_with(monkeypatch: pytest.MonkeyPatch, serve: object) -> None:
    module = types.ModuleType("orchd.serve")
    vars(module)["serve"] = serve
    monkeypatch.setitem(sys.modules, "orchd.serve", module)
    monkeypatch.setattr("orchd.serve", module, raising=False)


def test_serve_puts_its_options_into_the_configuration(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    given: list[Any] = []

    def serve(config: object, credentials: object, *, observer: object, last_words: object) -> int:
        given.extend([config, credentials])
        return 0

    serving_with(monkeypatch, serve)
    options = "--host ::1 --port 9000 -m x.gguf --device cpu --device cpu --slots 8 --ctx 2048"
    assert orchd("serve", *options.split()).exit_code == 0
    config, credentials = given
    assert (config.server.host, config.server.port) == ("::1", 9000)
    [pool] = config.pools
    assert Path(pool.model).name == "x.gguf"
    assert (pool.devices, pool.slots, pool.ctx) == (("cpu", "cpu"), 8, 2048)
    assert credentials.token == TOKEN


def test_serve_leaves_with_the_servers_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    serving_with(monkeypatch, lambda config, credentials, *, observer, last_words: 3)
    assert orchd("serve").exit_code == 3


def test_a_configuration_error_of_the_server_is_one_line_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(config: object, credentials: object, *, observer: object, last_words: object) -> int:
        raise ConfigError("port 8737 is taken;\nchoose another with --port")

    serving_with(monkeypatch, serve)
    result = orchd("serve")
    assert result.exit_code == 2
    assert one_line(result.stderr) == "orchd: port 8737 is taken; choose another with --port\n"
    assert result.stdout == ""
