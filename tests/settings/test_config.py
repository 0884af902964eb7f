"""How the configuration is found and merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from orchd.errors import ConfigError
from orchd.settings.config import ConfigFile, PoolConfig, ServerConfig
from orchd.settings.sources import load
from tests.settings.reading import Loader, refusal

pytestmark = pytest.mark.usefixtures("config_home")


def test_without_a_file_there_is_one_pool_with_the_demo_model(read: Loader) -> None:
    config = read()
    assert config.source is None
    assert config.pools == (PoolConfig(),)
    assert (config.pools[0].id, config.pools[0].model, config.pools[0].devices) == ("default", None, "auto")


def test_defaults_are_those_of_the_contract(read: Loader) -> None:
    config = read()
    assert (config.server.host, config.server.port) == ("127.0.0.1", 8737)
    assert (config.server.max_body_bytes, config.server.shutdown_grace_s) == (1 << 20, 30)
    assert (config.server.allowed_hosts, config.server.allowed_origins) == ((), None)
    assert config.queue.capacity == 64
    assert (config.tasks.retention_s, config.tasks.retained_bytes, config.tasks.cancel_grace_s) == (
        300,
        64 << 20,
        5,
    )
    assert (config.workers.stall_s, config.workers.step_target_ms) == (60, 120)
    pool = config.pools[0]
    assert (pool.slots, pool.ctx, pool.batch) == (4, 4096, 512)
    assert (pool.prompt_cache_mib, pool.speculate, pool.deterministic) == (1024, True, False)


def test_a_file_sets_everything(read: Loader, tmp_path: Path) -> None:
    config = read("""
        server = {host = "::1", port = 1, allowed_hosts = ["orchd.lan"], allowed_origins = []}
        queue.capacity = 3
        tasks.retention_s = 1.5
        workers.step_target_ms = 20
        models.roots = ["/srv/models"]
        [[pools]]
        id = "a"
        model = "/m/a.gguf"
        devices = ["cpu", "cpu"]
        cache_type_v = "q8_0"
        [[pools]]
        id = "b"
        model = "/m/b.gguf"
        devices = ["gpu:0", "gpu:GPU-8f5e3a"]
    """)
    assert (config.server.host, config.server.allowed_origins) == ("::1", ())
    assert (config.queue.capacity, config.tasks.retention_s, config.workers.step_target_ms) == (3, 1.5, 20)
    assert config.models.roots == ("/srv/models",)
    assert [(pool.id, pool.model) for pool in config.pools] == [("a", "/m/a.gguf"), ("b", "/m/b.gguf")]
    assert config.source == tmp_path / "etc" / "orchd.toml"


def test_a_deterministic_pool_neither_guesses_nor_keeps_prompts(read: Loader) -> None:
    pool = read("[[pools]]\nmodel = '/x.gguf'\ndeterministic = true\nprompt_cache_mib = 500\nspeculate = true").pools[0]
    assert (pool.prompt_cache_mib, pool.speculate) == (0, False)


def test_flags_beat_environment_beats_file_beats_defaults(read: Loader) -> None:
    toml = "[server]\nport = 1000\nhost = 'file'\nshutdown_grace_s = 7"
    config = read(toml, {"server.port": 3000}, {"ORCHD_PORT": "2000", "ORCHD_HOST": "environment"})
    assert (config.server.port, config.server.host, config.server.shutdown_grace_s) == (
        3000,
        "environment",
        7,
    )
    assert config.server.max_body_bytes == 1 << 20


def test_every_server_key_has_its_variable(read: Loader, tmp_path: Path) -> None:
    environ = {
        "ORCHD_HOST": "0.0.0.0",
        "ORCHD_PORT": "9000",
        "ORCHD_TOKEN": "a-token-of-sixteen",
        "ORCHD_ALLOWED_HOSTS": "orchd.lan, box ,",
        "ORCHD_ALLOWED_ORIGINS": "http://localhost:3000",
        "ORCHD_MAX_BODY_BYTES": "4096",
        "ORCHD_SHUTDOWN_GRACE_S": "2.5",
        "ORCHD_SOMETHING_ELSE": "is not read",
    }
    server = read(None, None, environ).server
    assert server == ServerConfig(
        host="0.0.0.0",
        port=9000,
        token="a-token-of-sixteen",
        allowed_hosts=("orchd.lan", "box"),
        allowed_origins=("http://localhost:3000",),
        max_body_bytes=4096,
        shutdown_grace_s=2.5,
    )
    assert read(None, None, {"ORCHD_TOKEN_FILE": "t"}).server.token_file == str(tmp_path / "work" / "t")


def test_a_token_file_from_the_environment_beats_a_token_in_the_file(read: Loader) -> None:
    server = read("[server]\ntoken = 'from-the-file-0123'", None, {"ORCHD_TOKEN_FILE": "/t"}).server
    assert (server.token, server.token_file) == (None, "/t")
    server = read("", None, {"ORCHD_TOKEN_FILE": "/t", "ORCHD_TOKEN": "from-the-variable"}).server
    assert server.token == "from-the-variable"


def test_the_first_file_found_is_the_one(tmp_path: Path, config_home: Path) -> None:
    places = [
        tmp_path / "named.toml",
        tmp_path / "variable.toml",
        tmp_path / "orchd.toml",
        config_home / "orchd.toml",
    ]
    config_home.mkdir(parents=True)
    for number, path in enumerate(places, start=1):
        path.write_text(f"server.port = {number}")

    def port(config_path: Path | None, environ: Mapping[str, str]) -> int:
        config = load(config_path=config_path, flags={}, environ=environ, cwd=tmp_path)
        assert config.source == places[config.server.port - 1]
        return config.server.port

    variable = {"ORCHD_CONFIG": "variable.toml"}
    assert port(places[0], variable) == 1
    assert port(None, variable) == 2
    assert port(None, {}) == 3
    places[2].unlink()
    assert port(None, {}) == 4


@pytest.mark.parametrize(("flag", "environ"), [("no.toml", {}), (None, {"ORCHD_CONFIG": "no.toml"})])
def test_a_file_that_was_named_must_exist(tmp_path: Path, flag: str | None, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml: no such file; (--config|ORCHD_CONFIG) must name"):
        load(config_path=Path(flag) if flag else None, flags={}, environ=environ, cwd=tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\); make it a readable file"):
        load(config_path=tmp_path, flags={}, environ={}, cwd=tmp_path)


def test_paths_in_the_file_start_at_its_folder(read: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    etc = tmp_path / "etc"
    (etc / "here.gguf").touch()
    toml = "models.roots = ['m', '~/n']\nserver.token_file = 't'\n[[pools]]\nmodel = '{}'"
    config = read(toml.format("sub/x.gguf"))
    assert config.models.roots == (str(etc / "m"), "/home/me/n")
    assert config.server.token_file == str(etc / "t")
    assert config.pools[0].model == str(etc / "sub/x.gguf")
    assert read(toml.format("here.gguf")).pools[0].model == str(etc / "here.gguf")
    assert read(toml.format("a-name-in-the-roots")).pools[0].model == "a-name-in-the-roots"


def test_a_model_after_a_flag_starts_at_the_working_directory(read: Loader, tmp_path: Path) -> None:
    assert read("", {"pools.model": "./x.gguf"}).pools[0].model == str(tmp_path / "work") + "/./x.gguf"


def test_pool_flags_set_the_only_pool(read: Loader) -> None:
    flags = {
        "pools.model": "/x.gguf",
        "pools.slots": 8,
        "pools.ctx": 512,
        "pools.devices": ["cpu"],
        "server.port": None,
    }
    expected = PoolConfig(model="/x.gguf", slots=8, ctx=512, devices=("cpu",))
    assert read(None, flags).pools == (expected,)
    assert read("[[pools]]\nid = 'a'", flags).pools == (msgspec.structs.replace(expected, id="a"),)
    assert read(None, {"pools.devices": ["auto"]}).pools[0].devices == "auto"


def test_flags_reach_every_section(read: Loader, tmp_path: Path) -> None:
    config = read("", {"queue.capacity": 2, "tasks.retention_s": 9, "models.roots": ["m"]})
    assert (config.queue.capacity, config.tasks.retention_s) == (2, 9)
    assert config.models.roots == (str(tmp_path / "work" / "m"),)


def test_a_pool_flag_with_several_pools_says_where_to_set_it(read: Loader, tmp_path: Path) -> None:
    toml = "[[pools]]\nid = 'a'\nmodel = 'x'\n[[pools]]\nid = 'b'\nmodel = 'x'"
    message = refusal(read, toml, {"pools.slots": 8})
    assert "--slots 8" in message
    assert f"{tmp_path}/etc/orchd.toml lists several (a, b)" in message
    assert "set slots under each [[pools]]" in message


def test_everything_is_described_for_the_reference() -> None:
    schema = msgspec.json.schema(ConfigFile)["$defs"]
    described = {name: struct["properties"] for name, struct in schema.items() if name != "ConfigFile"}
    assert set(described) == {f"{name}Config" for name in ("Server", "Queue", "Tasks", "Workers", "Models", "Pool")}
    assert [key for keys in described.values() for key, value in keys.items() if "description" not in value] == []
