"""What the owner may set, and how it is found: flags, then environment, then one TOML file, then defaults.

The structs are the reference: types, ranges and descriptions are read from them for error sentences, for the
documentation and for the JSON schema. Each source is checked by itself, so an error names the file, the
variable or the flag that the value came from, the key, the value, and what would be right.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import platformdirs
from msgspec import Meta

from orchd.errors import ConfigError
from orchd.strict import Strict, convert_tables, convert_value, fields

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "orchd.toml"
DAY_S = 86_400

HostName = Annotated[str, Meta(pattern=r"^[^\s/*,]+$", examples=["orchd.lan"])]
Origin = Annotated[str, Meta(pattern=r"^https?://[^\s/*,]+$", examples=["http://localhost:3000"])]
Folder = Annotated[str, Meta(min_length=1, examples=["~/models"])]
File = Annotated[str, Meta(min_length=1, examples=["~/models/llama.gguf"])]
DEVICE = r"^(cpu|gpu:([0-9]{1,3}|((GPU|MIG)-)?[0-9A-Fa-f-]{4,36}))$"
Device = Annotated[str, Meta(pattern=DEVICE)]
DEVICES = '"auto" or a list such as ["gpu:0", "gpu:1"], ["gpu:GPU-8f5e"] or ["cpu"]'
POOL_ID = "1 to 64 letters, digits, dots, underscores or hyphens"
PoolId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$", extra={"expected": POOL_ID})]
CacheType = Literal["f16", "q8_0", "q4_0", "f32", "bf16"]


class ServerConfig(Strict, frozen=True):
    """Where it listens, who gets in, and its limits."""

    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 takes a free one.")] = 8737
    token: Annotated[str | None, Meta(description="The token that every request must carry.")] = None
    token_file: Annotated[str | None, Meta(description="File that holds the token, mode 0600.")] = None
    allowed_hosts: Annotated[
        tuple[HostName, ...], Meta(description="Host headers that are accepted besides the loopback names.")
    ] = ()
    allowed_origins: Annotated[
        tuple[Origin, ...] | None,
        Meta(description="Browser origins that may read answers; left out: loopback origins on any port."),
    ] = None
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30, description="Largest request body, in bytes.")] = 1 << 20
    shutdown_grace_s: Annotated[
        float, Meta(ge=0, le=DAY_S, description="Seconds that running tasks have to finish at shutdown.")
    ] = 30.0

    def __repr__(self) -> str:
        """Every field, the token as ``***``."""
        return f"ServerConfig({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Fields for `rich`, which would otherwise print the token in a traceback's locals."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        return list((shown if self.token is None else shown | {"token": "***"}).items())


class QueueConfig(Strict, frozen=True):
    """What may wait."""

    capacity: Annotated[int, Meta(ge=1, le=1_000_000, description="Tasks that may wait in each pool's queue.")] = 64


class TasksConfig(Strict, frozen=True):
    """How long tasks are kept."""

    retention_s: Annotated[
        float, Meta(ge=0, le=30 * DAY_S, description="Seconds that a task's events are kept after its end.")
    ] = 300.0
    retained_bytes: Annotated[
        int,
        Meta(ge=0, le=1 << 40, description="Bytes of events that are kept for ended tasks, all together."),
    ] = 64 << 20
    cancel_grace_s: Annotated[
        float, Meta(ge=0, le=DAY_S, description="Seconds without a listener after which a task is cancelled.")
    ] = 5.0


class WorkersConfig(Strict, frozen=True):
    """How devices work."""

    stall_s: Annotated[
        float,
        Meta(
            gt=0,
            le=DAY_S,
            description="Seconds without a finished step after which a busy worker is not alive.",
        ),
    ] = 60.0
    step_target_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=60_000,
            description="Longest step while a task is streaming, in milliseconds; sizes prefill.",
        ),
    ] = 120


class ModelsConfig(Strict, frozen=True):
    """Where models lie."""

    roots: Annotated[tuple[Folder, ...], Meta(description="Folders whose models a reload may ask for.")] = ()


class PoolConfig(Strict, frozen=True):
    """One model, a replica of it on each device, one queue before them."""

    id: Annotated[PoolId, Meta(description="The pool's name in requests and metrics.")] = "default"
    model: Annotated[
        File | None,
        Meta(description="A GGUF file: its path from this file's folder, or its name in the roots."),
    ] = None
    devices: Annotated[
        Literal["auto"] | Annotated[tuple[Device, ...], Meta(min_length=1)],
        Meta(
            description="Where its replicas live, one each; `auto` takes every GPU, else the CPU.",
            extra={"expected": DEVICES},
        ),
    ] = "auto"
    slots: Annotated[int, Meta(ge=1, le=256, description="Tasks that run at the same time on each replica.")] = 4
    ctx: Annotated[int, Meta(ge=16, le=1 << 24, description="Tokens per slot, prompt and output together.")] = 4096
    batch: Annotated[int, Meta(ge=1, le=65536, description="Most tokens that one step may process.")] = 512
    threads: Annotated[int, Meta(ge=0, le=1024, description="Threads per replica; 0 divides the machine's cores.")] = 0
    flash_attn: Annotated[Literal["auto", "on", "off"], Meta(description="Flash attention.")] = "auto"
    cache_type_k: Annotated[CacheType, Meta(description="Data type of the K cache.")] = "f16"
    cache_type_v: Annotated[
        CacheType, Meta(description="Data type of the V cache; a quantised one needs flash attention.")
    ] = "f16"
    reload: Annotated[
        Literal["auto", "replace"],
        Meta(
            description='How a reload goes: "auto" loads the new model beside the old where memory allows, '
            '"replace" always frees the old one first.'
        ),
    ] = "auto"
    swa_full: Annotated[
        bool,
        Meta(description="Keep all of a sliding-window layer's cache, to reuse any prefix; off saves memory."),
    ] = True
    mmap: Annotated[bool, Meta(description="Map the model file instead of reading it into memory.")] = True


class ConfigFile(Strict, frozen=True):
    """Everything a configuration file may hold."""

    server: ServerConfig = ServerConfig()
    queue: QueueConfig = QueueConfig()
    tasks: TasksConfig = TasksConfig()
    workers: WorkersConfig = WorkersConfig()
    models: ModelsConfig = ModelsConfig()
    pools: Annotated[
        tuple[PoolConfig, ...],
        Meta(min_length=1, extra={"expected": "one or more tables, each begun by [[pools]]"}),
    ] = (PoolConfig(),)


class Config(ConfigFile, frozen=True):
    """The settings in force. A pool whose ``model`` is None serves the demo model; paths are absolute."""

    source: Path | None = None
    """The file it was read from."""


def load(*, config_path: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str], cwd: Path) -> Config:
    """Read the configuration.

    Args:
        config_path: ``--config``.
        flags: Values by dotted key, such as ``server.port`` or ``pools.slots``; None counts as not given.
        environ: ``ORCHD_CONFIG``, and ``ORCHD_`` with a server key in capitals; lists are comma-separated.
        cwd: Where relative paths in flags and variables start, and where ``orchd.toml`` is looked for.

    Raises:
        ConfigError: One line that names the source, the key, the value and what would be right.
    """
    source, settings, pools_listed = _read_first(config_path, environ, cwd)
    settings = _with_environment(settings, environ, cwd)
    settings = _with_flags(settings, {key: flags[key] for key in flags if flags[key] is not None}, cwd, source)
    where = " and ".join(
        [str(source)] * pools_listed + ["flags"] * any(key.startswith("pools.") for key in flags) or ["defaults"]
    )
    for index, pool in enumerate(settings.pools):
        _check_pool(pool, f"{where}: pools[{index}]", model_needed=pools_listed)
    return Config(**{name: getattr(settings, name) for name in ConfigFile.__struct_fields__}, source=source)


def _read_first(
    config_path: Path | None, environ: Mapping[str, str], cwd: Path
) -> tuple[Path | None, ConfigFile, bool]:
    """The file, what it says, and whether it lists pools."""
    named = config_path or environ.get("ORCHD_CONFIG")
    places = [named] if named else [FILE_NAME, platformdirs.user_config_path("orchd") / FILE_NAME]
    for path in (Path(_absolute(str(place), cwd)) for place in places):
        try:
            data = tomllib.loads(path.read_bytes().decode())
        except (FileNotFoundError, NotADirectoryError):
            if named:
                by = "--config" if config_path else "ORCHD_CONFIG"
                raise ConfigError(f"{path}: no such file; {by} must name a TOML file that exists") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); make it a readable file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML, {error}; correct that place") from None
        else:
            return path, _from_table(data, path), "pools" in data
    return None, ConfigFile(), False


def _from_table(data: dict[str, Any], path: Path) -> ConfigFile:
    settings = convert_tables(data, ConfigFile, str(path), secrets=("server.token",))
    ids = [pool.id for pool in settings.pools]
    for index, pool_id in enumerate(ids):
        if pool_id in ids[:index]:
            first = ids.index(pool_id)
            raise ConfigError(
                f"{path}: pools[{index}].id is {pool_id!r}, as is that of pools[{first}]; give each its own"
            )
    replace, base = msgspec.structs.replace, path.parent
    token_file = settings.server.token_file and _absolute(settings.server.token_file, base)
    return replace(
        settings,
        server=replace(settings.server, token_file=token_file),
        models=replace(settings.models, roots=tuple(_absolute(root, base) for root in settings.models.roots)),
        pools=tuple(replace(pool, model=_located(pool.model, base)) for pool in settings.pools),
    )


def _with_environment(settings: ConfigFile, environ: Mapping[str, str], cwd: Path) -> ConfigFile:
    server = settings.server
    for name, kind in sorted(fields(ServerConfig).items(), key=lambda item: item[0] == "token"):  # see _replace_server
        variable = f"ORCHD_{name.upper()}"
        if variable not in environ:
            continue
        text: Any = environ[variable]
        if isinstance(getattr(ServerConfig(), name), tuple) or name == "allowed_origins":
            text = [item.strip() for item in text.split(",") if item.strip()]
        value = convert_value(text, kind, f"environment: {variable}", secret=name == "token")
        server = _replace_server(server, name, value, cwd)
    return msgspec.structs.replace(settings, server=server)


def _with_flags(settings: ConfigFile, flags: Mapping[str, Any], cwd: Path, source: Path | None) -> ConfigFile:
    sections: dict[str, Any] = {name: getattr(settings, name) for name in ConfigFile.__struct_fields__}
    for key, value in flags.items():
        section, name = key.split(".")
        flag = f"--{name.replace('_', '-')}"
        if section == "pools":
            if len(settings.pools) > 1:
                ids = ", ".join(pool.id for pool in settings.pools)
                raise ConfigError(
                    f"{flag} {value!r} sets pools.{name} of one pool, but {source} lists several ({ids}); "
                    f"set {name} under each [[pools]] there"
                )
            kind = fields(PoolConfig)[name]
            value = convert_value("auto" if name == "devices" and value in (["auto"], ("auto",)) else value, kind, flag)
            value = _located(value, cwd) if name == "model" else value
            sections["pools"] = (msgspec.structs.replace(sections["pools"][0], **{name: value}),)
        elif section == "server":
            value = convert_value(value, fields(ServerConfig)[name], flag, secret=name == "token")
            sections["server"] = _replace_server(sections["server"], name, value, cwd)
        else:
            value = convert_value(value, fields(type(sections[section]))[name], flag)
            value = tuple(_absolute(root, cwd) for root in value) if name == "roots" else value
            sections[section] = msgspec.structs.replace(sections[section], **{name: value})
    return ConfigFile(**sections)


def _replace_server(server: ServerConfig, name: str, value: Any, cwd: Path) -> ServerConfig:
    if name == "token_file":  # a token from a weaker source must not win over a token file from a stronger one
        return msgspec.structs.replace(server, token_file=_absolute(value, cwd), token=None)
    return msgspec.structs.replace(server, **{name: value})


def _check_pool(pool: PoolConfig, where: str, *, model_needed: bool) -> None:
    if model_needed and pool.model is None:
        raise ConfigError(f"{where}.model is missing; name a GGUF file there, or with --model for a single pool")
    if pool.batch < pool.slots:
        raise ConfigError(
            f"{where}.batch is {pool.batch}, fewer than its {pool.slots} slots, and each running task takes "
            f"one token of a step; make batch at least {pool.slots}"
        )
    if pool.flash_attn == "off" and pool.cache_type_v in ("q8_0", "q4_0"):
        raise ConfigError(
            f"{where}.cache_type_v is {pool.cache_type_v!r}, which needs flash attention; "
            f"set flash_attn to 'auto' or 'on', or cache_type_v to 'f16'"
        )
    gpus = [device for device in pool.devices if device.startswith("gpu:")] if pool.devices != "auto" else []
    for gpu in gpus:
        if gpus.count(gpu) > 1:
            raise ConfigError(f"{where}.devices lists {gpu!r} more than once; list each GPU once, or raise slots")


def _located(model: str | None, base: Path) -> str | None:
    """A path as an absolute one; a bare name that is no file in ``base`` stays: the roots may have it."""
    if model is None:
        return None
    path = _absolute(model, base)
    return path if "/" in model or os.path.lexists(path) else model


def _absolute(path: str, base: Path) -> str:
    return os.path.join(base, os.path.expanduser(path))
