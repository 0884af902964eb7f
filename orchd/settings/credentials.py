"""The one token: where it is found, and how the first start makes it.

A token is 16 to 4096 printable ASCII characters without spaces, so that it fits an ``Authorization`` header
as it is. It appears in no ``repr``, no log line and no error.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from orchd.errors import ConfigError
from orchd.settings.config import Config
from orchd.settings.sources import user_folder

FILE_NAME = "token"
MIN_CHARS = 16
MAX_CHARS = 4096
MADE_BY = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


@dataclass(frozen=True)
class Credentials:
    """The token in force.

    Attributes:
        token: What requests carry after ``Bearer``.
        origin: Where it came from, for people: ``ORCHD_TOKEN``, ``file /path``, ``server.token in /path``.
        created: Whether this call made it.
    """

    token: str = field(repr=False)
    origin: str
    created: bool = False

    @property
    def file(self) -> str | None:
        """The file that holds it; None if it came from elsewhere."""
        return self.origin.removeprefix("file ") if self.origin.startswith("file ") else None


def token_path() -> Path:
    """Where the token lives that orchd makes itself, in the user's state directory.

    Raises:
        ConfigError: The account has no home, so there is no such place.
    """
    folder = user_folder(platformdirs.user_state_path)
    if folder is None:
        raise ConfigError("this account has no home directory to store a token in; set HOME or ORCHD_TOKEN")
    return folder / FILE_NAME


def find_or_create_token(config: Config, *, token_file_flag: Path | None, environ: Mapping[str, str]) -> Credentials:
    """The token for a server; makes one at `token_path` if none is set. Starts at the same time agree on one.

    Raises:
        ConfigError: A token is set and not usable, or none is set and none can be made.
    """
    if found := _configured(config, token_file_flag, environ):
        return found
    path = token_path()
    created = not os.path.lexists(path) and _create(path)
    return Credentials(_read(path, named_by="orchd itself"), f"file {path}", created)


def find_token(
    config: Config, *, token_file_flag: Path | None = None, environ: Mapping[str, str], announced: str | None = None
) -> Credentials:
    """The token for a client on the same account. Never makes one.

    Args:
        config: The whole configuration.
        token_file_flag: ``--token-file``.
        environ: For ``ORCHD_TOKEN``.
        announced: The file from which the server has its token, by its own word; counts where nothing else is set.

    Raises:
        ConfigError: None is set and no server has made one, or the one that is set is not usable.
    """
    if found := _configured(config, token_file_flag, environ):
        return found
    if announced is not None:
        return Credentials(_read(Path(announced), named_by="the server that runs"), f"file {announced}")
    path = token_path()
    if not os.path.lexists(path):
        raise ConfigError(
            f"no token: {path} does not exist; start the server once with 'orchd serve', or set ORCHD_TOKEN"
        )
    return Credentials(_read(path, named_by="orchd itself"), f"file {path}")


def _configured(config: Config, token_file_flag: Path | None, environ: Mapping[str, str]) -> Credentials | None:
    if token_file_flag is not None:
        return Credentials(_read(token_file_flag, named_by="--token-file"), f"file {token_file_flag}")
    if "ORCHD_TOKEN" in environ:
        return Credentials(_checked(environ["ORCHD_TOKEN"], "ORCHD_TOKEN"), "ORCHD_TOKEN")
    if config.server.token is not None:
        origin = f"server.token in {config.source}" if config.source else "server.token"
        return Credentials(_checked(config.server.token, origin), origin)
    if config.server.token_file is not None:
        path = Path(config.server.token_file)
        return Credentials(_read(path, named_by=_namer_of_token_file(config, environ)), f"file {path}")
    return None


def _namer_of_token_file(config: Config, environ: Mapping[str, str]) -> str:
    if "ORCHD_TOKEN_FILE" in environ:
        return "ORCHD_TOKEN_FILE"
    return f"server.token_file in {config.source}" if config.source else "server.token_file"


def _read(path: Path, *, named_by: str) -> str:
    where = f"token file {path} (set by {named_by})"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hold up the start
        try:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{where} is not a regular file; name a file that holds the token")
            if mode & 0o077:
                raise ConfigError(
                    f"{where} has mode {stat.S_IMODE(mode):04o}, open to other users of this machine; "
                    f"run: chmod 600 {shlex.quote(str(path))}"
                )
            data = os.read(fd, MAX_CHARS + 3)
        finally:
            os.close(fd)
        _check_folder(Path(os.path.realpath(path)).parent, where)
    except FileNotFoundError:
        raise ConfigError(
            f"{where} does not exist; create it with: (umask 077; {MADE_BY} > {shlex.quote(str(path))})"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise ConfigError(f"{where} cannot be read ({reason}); make it readable for this account") from None
    return _checked(data.decode("latin-1"), where.removeprefix("token "))


def _check_folder(folder: Path, where: str) -> None:
    """Raise `ConfigError` if others may put a token of their own in the place of the file."""
    mode = folder.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise ConfigError(
            f"{where} is in a folder of mode {stat.S_IMODE(mode):04o}, where other users can replace it; "
            f"run: chmod go-w {shlex.quote(str(folder))}"
        )


def _checked(text: str, where: str) -> str:
    """The token without its trailing newline, if it is one."""
    token = text[:-1] if text.endswith("\n") else text
    token = token[:-1] if token.endswith("\r") else token
    if not token.strip():
        problem = "is empty"
    elif not all("!" <= char <= "~" for char in token):
        problem = "contains a space or a character outside printable ASCII"
    elif len(token) < MIN_CHARS:
        problem = f"is shorter than {MIN_CHARS} characters"
    elif len(token) > MAX_CHARS:
        problem = f"is longer than {MAX_CHARS} characters"
    else:
        return token
    raise ConfigError(f"the token from {where} {problem}; generate a new one with: {MADE_BY}")


def _create(path: Path) -> bool:
    """Make the token file, complete from the moment it has its name. False if another start was first."""
    temporary = path.with_name(f".{FILE_NAME}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with open(fd, "w", encoding="ascii") as file:
                file.write(secrets.token_urlsafe(32) + "\n")
                file.flush()
                os.fsync(fd)
            try:
                os.link(temporary, path)  # unlike rename, fails if the name is taken
            except FileExistsError:
                return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise ConfigError(
            f"cannot create the token file {path} ({error.strerror}); make its folder writable, free some "
            f"space, or set ORCHD_TOKEN"
        ) from None
    return True
