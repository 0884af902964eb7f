"""How the settings are found: flags, then environment, then one TOML file, then defaults.

Each source is checked by itself, so an error names the file, the variable or the flag that the value came from, the
key, the value, and what would be right.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import platformdirs

from orchd.errors import ConfigError
from orchd.settings.config import Config, ConfigFile, PoolConfig, ServerConfig
from orchd.settings.strict import Mistake, convert_tables, convert_value, fields

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "orchd.toml"

MOST_BYTES = 1 << 20
"""Of a configuration file; /dev/zero has more."""


def load(*, config_path: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str], cwd: Path) -> Config:
    """Read the configuration; see `survey` for the arguments.

    Raises:
        ConfigError: One line about the first mistake: the source, the key, the value and what would be right.
    """
    config, mistakes = survey(config_path=config_path, flags=flags, environ=environ, cwd=cwd)
    if mistakes:
        more = f" (and {len(mistakes) - 1} more; 'orchd check' lists them all)" if len(mistakes) > 1 else ""
        raise ConfigError(f"{mistakes[0]}{more}")
    return config


def survey(
    *, config_path: Path | None, flags: Mapping[str, Any], environ: Mapping[str, str], cwd: Path
) -> tuple[Config, list[str]]:
    """Read the configuration whatever mistakes are in it; what is wrong counts as not set.

    Args:
        config_path: ``--config``.
        flags: Values by dotted key, such as ``server.port`` or ``pools.slots``; None counts as not given.
        environ: ``ORCHD_CONFIG``, and ``ORCHD_`` with a server key in capitals; lists are comma-separated.
        cwd: Where relative paths in flags and variables start, and where ``orchd.toml`` is looked for.

    Returns:
        What can be used, and a line for each mistake.

    Raises:
        ConfigError: There is no such file, or it cannot be read, or is no TOML.
    """
    source, settings, pools_listed, of_file = _read_first(config_path, environ, cwd)
    mistakes = [mistake.sentence for mistake in of_file]
    settings = _with_environment(settings, environ, cwd, mistakes)
    given = {key: flags[key] for key in flags if flags[key] is not None}
    settings = _with_flags(settings, given, cwd, source, mistakes)
    where = " and ".join([str(source)] * pools_listed + ["flags"] * any(key.startswith("pools.") for key in given))
    for index, pool in enumerate(settings.pools):
        if not any(mistake.key.startswith(f"pools[{index}].") for mistake in of_file):
            with _noted(mistakes):
                _check_pool(pool, f"{where or 'defaults'}: pools[{index}]", model_needed=pools_listed)
    return Config(**{name: getattr(settings, name) for name in ConfigFile.__struct_fields__}, source=source), mistakes


@contextlib.contextmanager
def _noted(mistakes: list[str]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        mistakes.append(str(error))


def working_folder() -> Path:
    """Where this process runs. Raises `ConfigError` if that is no more."""
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory cannot be used ({error.strerror}); change to a folder that exists"
        ) from None


def user_folder(find: Callable[[str], Path]) -> Path | None:
    """This account's folder of the kind that a function of platformdirs finds; None if the account has no home."""
    try:
        folder = find("orchd")
    except RuntimeError:
        return None
    return folder if folder.is_absolute() else None  # some versions answer "~/.config"


def _read_first(
    config_path: Path | None, environ: Mapping[str, str], cwd: Path
) -> tuple[Path | None, ConfigFile, bool, list[Mistake]]:
    """The file, what it says, whether it lists pools, and what is wrong in it."""
    named = config_path or environ.get("ORCHD_CONFIG")
    places: list[str | Path] = [named] if named else [FILE_NAME]
    if not named and (folder := user_folder(platformdirs.user_config_path)) is not None:
        places.append(folder / FILE_NAME)
    for path in (Path(_absolute(str(place), cwd)) for place in places):
        try:
            data = tomllib.loads(_read(path).decode())
        except (FileNotFoundError, NotADirectoryError):
            if named:
                by = "--config" if config_path else "ORCHD_CONFIG"
                raise ConfigError(f"{path}: no such file; {by} must name an existing TOML file") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); make it a readable file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}; fix the syntax there") from None
        else:
            settings, mistakes = _from_table(data, path)
            return path, settings, "pools" in data, mistakes
    return None, ConfigFile(), False, []


def _read(path: Path) -> bytes:
    """A file, or what someone writes into a pipe (``--config <(…)``); a pipe without a writer must not hold up a start.

    Raises:
        OSError: It cannot be read, or is no configuration.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        os.set_blocking(file.fileno(), True)
        data = file.read(MOST_BYTES + 1)
        if not data and stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            raise OSError("nothing writes to this pipe")
    if len(data) > MOST_BYTES:
        raise OSError(f"it is larger than {MOST_BYTES} bytes")
    return data


def _from_table(data: dict[str, Any], path: Path) -> tuple[ConfigFile, list[Mistake]]:
    settings, mistakes = convert_tables(data, ConfigFile, str(path), secrets=("server.token",))
    wrong = {mistake.key for mistake in mistakes}
    ids = [None if f"pools[{index}].id" in wrong else pool.id for index, pool in enumerate(settings.pools)]
    for index, pool_id in enumerate(ids):
        if pool_id is not None and pool_id in ids[:index]:
            said = f"pools[{index}].id is {pool_id!r}, the same as pools[{ids.index(pool_id)}].id"
            mistakes.append(Mistake(f"pools[{index}].id", f"{path}: {said}; give each pool its own id"))
    replace, base = msgspec.structs.replace, path.parent
    token_file = settings.server.token_file and _absolute(settings.server.token_file, base)
    settings = replace(
        settings,
        server=replace(settings.server, token_file=token_file),
        models=replace(settings.models, roots=tuple(_absolute(root, base) for root in settings.models.roots)),
        pools=tuple(replace(pool, model=_located(pool.model, base)) for pool in settings.pools),
    )
    return settings, mistakes


def _with_environment(settings: ConfigFile, environ: Mapping[str, str], cwd: Path, mistakes: list[str]) -> ConfigFile:
    server = settings.server
    for name, kind in sorted(fields(ServerConfig).items(), key=lambda item: item[0] == "token"):  # see _replace_server
        variable = f"ORCHD_{name.upper()}"
        if variable not in environ:
            continue
        text: Any = environ[variable]
        if isinstance(getattr(ServerConfig(), name), tuple) or name == "allowed_origins":
            text = [item.strip() for item in text.split(",") if item.strip()]
        with _noted(mistakes):
            value = convert_value(text, kind, f"environment: {variable}", secret=name == "token")
            server = _replace_server(server, name, value, cwd)
    return msgspec.structs.replace(settings, server=server)


def _with_flags(
    settings: ConfigFile, flags: Mapping[str, Any], cwd: Path, source: Path | None, mistakes: list[str]
) -> ConfigFile:
    for key, value in flags.items():
        with _noted(mistakes):
            settings = _with_flag(settings, key, value, cwd, source)
    return settings


def _with_flag(settings: ConfigFile, key: str, value: Any, cwd: Path, source: Path | None) -> ConfigFile:
    section, name = key.split(".")
    flag = _FLAGS.get(key, f"--{name.replace('_', '-')}")
    changed: Any
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
        changed = (msgspec.structs.replace(settings.pools[0], **{name: value}),)
    elif section == "server":
        value = convert_value(value, fields(ServerConfig)[name], flag, secret=name == "token")
        changed = _replace_server(settings.server, name, value, cwd)
    else:
        table = getattr(settings, section)
        value = convert_value(value, fields(type(table))[name], flag)
        value = tuple(_absolute(root, cwd) for root in value) if name == "roots" else value
        changed = msgspec.structs.replace(table, **{name: value})
    return msgspec.structs.replace(settings, **{section: changed})


_FLAGS: Final = {"pools.devices": "--device", "models.roots": "--models-dir"}
"""Those that are not called like their key."""


def _replace_server(server: ServerConfig, name: str, value: Any, cwd: Path) -> ServerConfig:
    if name == "token_file":  # a token from a weaker source must not win over a token file from a stronger one
        return msgspec.structs.replace(server, token_file=_absolute(value, cwd), token=None)
    return msgspec.structs.replace(server, **{name: value})


def _check_pool(pool: PoolConfig, where: str, *, model_needed: bool) -> None:
    if model_needed and pool.model is None:
        raise ConfigError(f"{where}.model is required; set it to a GGUF file, or use --model for a single pool")
    if pool.batch < pool.slots:
        raise ConfigError(
            f"{where}.batch is {pool.batch}, less than its {pool.slots} slots, but each running task takes "
            f"one token of a step; set batch to at least {pool.slots}"
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
    if model is None or model == "demo":
        return model
    path = _absolute(model, base)
    return path if "/" in model or os.path.lexists(path) else model


def _absolute(path: str, base: Path) -> str:
    return os.path.join(base, os.path.expanduser(path))
