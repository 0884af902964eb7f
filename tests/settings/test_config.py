"""How the configuration is found and merged, and what each mistake in it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchd.errors import ConfigError
from orchd.settings.config import Config, ConfigFile, PoolConfig, ServerConfig
from orchd.settings.sources import load

Loader = Callable[..., Config]


@pytest.fixture(autouse=True)
def config_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's config directory that is empty, whoever runs the tests."""
    home = tmp_path / "config-home"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    return home / "orchd"


@pytest.fixture
def read(tmp_path: Path) -> Loader:
    """Loads TOML text, flags and environment; ``work`` is the working directory, ``etc`` holds the file."""
    (tmp_path / "work").mkdir()
    (tmp_path / "etc").mkdir()

    def read(
        toml: str | None = None,
        flags: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        path = tmp_path / "etc" / "orchd.toml"
        if toml is not None:
            path.write_text(toml)
        return load(
            config_path=None if toml is None else path,
            flags=flags or {},
            environ=environ or {},
            cwd=tmp_path / "work",
        )

    return read


def refusal(read: Loader, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert "Object" not in message, "msgspec's own words"
    assert "at `$" not in message.partition(";")[2], "msgspec's own path"
    return message


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
    assert (config.pools[0].slots, config.pools[0].ctx, config.pools[0].batch) == (4, 4096, 512)


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


POOL = "[[pools]]\nmodel = 'x'\n"


@pytest.mark.parametrize(
    ("toml", "key_and_value", "remedy"),
    [
        ("[server]\nprot = 1", "unknown key server.prot", "did you mean server.port?"),
        ("[sever]\nport = 1", "unknown key sever", "did you mean server?"),
        ("capacity = 1", "unknown key capacity", "did you mean queue.capacity?"),
        ("zzz = 1", "unknown key zzz", "available: server, queue, tasks, workers, models, pools"),
        ("source = 'x'", "unknown key source", "available"),
        ('"a` - at `$.x" = 1', "unknown key 'a` - at `$.x'", "available"),
        (POOL + "slot = 1", "unknown key pools[0].slot", "did you mean pools[0].slots?"),
        ("[server]\nport = '80'", "server.port is '80'", "expected a whole number from 0 to 65535"),
        ("[server]\nport = 65536", "server.port is 65536", "from 0 to 65535"),
        ("[server]\nport = 1e3", "server.port is 1000.0", "a whole number"),
        ("[server]\nport = true", "server.port is True", "a whole number"),
        ("[server]\nport = 1979-05-27", "server.port is datetime.date", "a whole number"),
        ("server = 3", "server is 3", "expected a table"),
        ("[server]\nhost = ''", "server.host is ''", "expected a string"),
        ("[server]\nallowed_origins = ['*']", "server.allowed_origins[0] is '*'", '"http://localhost:3000"'),
        (
            "[server]\nallowed_origins = ['https://a/']",
            "server.allowed_origins[0] is 'https://a/'",
            '"tauri://localhost"',
        ),
        ("[server]\nallowed_hosts = ['http://a']", "server.allowed_hosts[0] is 'http://a'", '"orchd.lan" or "fd00::1"'),
        ("[tasks]\nretention_s = inf", "tasks.retention_s is inf", "expected a number from 0 to 2592000"),
        ("[tasks]\nretention_s = nan", "tasks.retention_s is nan", "expected a number from 0 to 2592000"),
        ("[queue]\ncapacity = 0", "queue.capacity is 0", "from 1 to"),
        ("[queue]\ncapacity = 99999999999999999999", "queue.capacity is 99999999999999999999", "from 1 to"),
        ("[workers]\nstall_s = 0", "workers.stall_s is 0", "above 0"),
        ("[models]\nroots = 'm'", "models.roots is 'm'", 'a list, each a string such as "~/models"'),
        ("pools = []", "pools is []", "one or more tables, each begun by [[pools]]"),
        ("[pools]\nid = 'a'", "pools is a table", "each begun by [[pools]]"),
        (POOL + "id = 'a b'", "pools[0].id is 'a b'", "1 to 64 letters, digits, dots"),
        (POOL + POOL, "pools[1].id is 'default', the same as pools[0].id", "give each pool its own id"),
        ("[[pools]]\nid = 'a'", "pools[0].model is required", "set it to a GGUF file"),
        (POOL + "devices = 'cpu'", "pools[0].devices is 'cpu'", '["cpu"]'),
        (POOL + "devices = ['gpu']", "pools[0].devices[0] is 'gpu'", '"auto" or a list such as ["gpu:0"'),
        (POOL + "devices = []", "pools[0].devices is []", '"auto" or a list such as'),
        (
            POOL + "devices = ['gpu:0', 'gpu:0']",
            "pools[0].devices lists 'gpu:0' more than once",
            "list each GPU once",
        ),
        (POOL + "flash_attn = 'yes'", "pools[0].flash_attn is 'yes'", '"auto" or "off" or "on"'),
        (
            POOL + "flash_attn = 'off'\ncache_type_v = 'q4_0'",
            "pools[0].cache_type_v is 'q4_0'",
            "set flash_attn to",
        ),
        (POOL + "batch = 2", "pools[0].batch is 2", "set batch to at least 4"),
        (POOL + "mmap = 1", "pools[0].mmap is 1", "expected true or false"),
        ("[server]\nport = = 1", "not valid TOML", "(at line 2, column 8)"),
        ("[server]\nport = 1\nport = 2", "not valid TOML", "not valid TOML: Cannot overwrite a value"),
        ("a = " + "[" * 50_000, "not valid TOML", "fix the syntax there"),
    ],
)
def test_a_mistake_in_the_file(read: Loader, tmp_path: Path, toml: str, key_and_value: str, remedy: str) -> None:
    message = refusal(read, toml)
    assert message.startswith(f"{tmp_path}/etc/orchd.toml: ")
    assert key_and_value in message
    assert remedy in message


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "orchd.toml"
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match=r"orchd\.toml: byte 5 is not UTF-8; save the file as UTF-8"):
        load(config_path=None, flags={}, environ={}, cwd=tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ORCHD_PORT", "http", "a whole number from 0 to 65535"),
        ("ORCHD_PORT", "", "a whole number from 0 to 65535"),
        ("ORCHD_SHUTDOWN_GRACE_S", "nan", "a number from 0 to 86400"),
        ("ORCHD_MAX_BODY_BYTES", "1 MiB", "a whole number from 1024 to"),
        ("ORCHD_ALLOWED_ORIGINS", "*", 'each a string such as "http://localhost:3000"'),
        ("ORCHD_HOST", "", "a string"),
    ],
)
def test_a_mistake_in_the_environment(read: Loader, variable: str, value: str, remedy: str) -> None:
    message = refusal(read, None, None, {variable: value})
    assert message.startswith(f"environment: {variable} is ")
    assert repr(value) in message
    assert remedy in message


@pytest.mark.parametrize(
    ("key", "value", "start", "remedy"),
    [
        ("server.port", -1, "--port is -1", "from 0 to 65535"),
        ("pools.slots", 0, "--slots is 0", "from 1 to 256"),
        ("pools.devices", ["gpu0"], "--device is ['gpu0']", '"auto" or a list such as'),
        ("pools.cache_type_k", "q9", "--cache-type-k is 'q9'", '"q8_0"'),
        ("pools.batch", 3, "flags: pools[0].batch is 3", "set batch to at least 4"),
        ("models.roots", [""], "--models-dir is ['']", "a list"),
    ],
)
def test_a_mistake_in_a_flag(read: Loader, key: str, value: object, start: str, remedy: str) -> None:
    message = refusal(read, None, {key: value})
    assert message.startswith(start)
    assert remedy in message


def test_the_token_is_never_shown(read: Loader) -> None:
    config = read(None, None, {"ORCHD_TOKEN": "s3cret-s3cret-s3cret"})
    assert config.server.token == "s3cret-s3cret-s3cret"
    shown = repr(config) + repr(config.server.__rich_repr__())
    assert "s3cret" not in shown
    assert "***" in shown
    assert "s3cret" not in refusal(read, "[server]\ntoken = ['s3cret']")
    assert "s3cret" not in refusal(read, "server.token = {s3cret = 1}")


def test_everything_is_described_for_the_reference() -> None:
    schema = msgspec.json.schema(ConfigFile)["$defs"]
    described = {name: struct["properties"] for name, struct in schema.items() if name != "ConfigFile"}
    assert set(described) == {f"{name}Config" for name in ("Server", "Queue", "Tasks", "Workers", "Models", "Pool")}
    assert [key for keys in described.values() for key, value in keys.items() if "description" not in value] == []


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(max_size=4), scalars, max_size=1)
keys = st.sampled_from([f"pools.{name}" for name in PoolConfig.__struct_fields__])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(keys, values, max_size=3))
def test_any_flag_value_is_taken_or_refused_in_one_sentence(tmp_path_factory: Any, flags: dict[str, Any]) -> None:
    try:
        config = load(config_path=None, flags=flags, environ={}, cwd=tmp_path_factory.getbasetemp())
    except ConfigError as error:
        message = str(error)
    else:
        message = ""
        msgspec.convert(msgspec.to_builtins(config.pools), tuple[PoolConfig, ...])
    assert "\n" not in message
