"""What each mistake in the configuration is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchd.errors import ConfigError
from orchd.settings.config import PoolConfig
from orchd.settings.sources import load
from tests.settings.reading import Loader, refusal

pytestmark = pytest.mark.usefixtures("config_home")

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
