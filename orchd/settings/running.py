"""The servers that run on this account: each leaves a record of where it listens, beside the token it makes.

A server holds a lock on its record for as long as it lives, however it ends; a record that anyone can lock is of a
server that is gone. No process id is looked at (another process may have it), and no port is asked (another program may
answer).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from orchd.errors import ConfigError
from orchd.settings.credentials import token_path

_log = logging.getLogger(__name__)

FOLDER = "servers"
SUFFIX = ".json"
MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class RunningServer:
    """What a server tells of itself.

    Attributes:
        url: Where it can be reached from this machine.
        config: Its configuration file; None if it has none.
        token_file: The file that holds its token; None if it has the token from elsewhere.
    """

    url: str
    config: str | None
    token_file: str | None


@contextlib.contextmanager
def announced(server: RunningServer) -> Iterator[None]:
    """Leave a record for the duration of the context. Where that cannot be done, clients need an address."""
    with contextlib.ExitStack() as held:
        try:
            _write(server, held)
        except (OSError, ConfigError) as error:
            _log.info("other commands need --url to find this server: its record could not be written (%s)", error)
        yield


def running_servers() -> list[RunningServer]:
    """Those that are alive. Records that others could have written are left out: a client sends its token there."""
    try:
        folder = token_path().parent / FOLDER
        if not _ours(folder.stat()):
            return []
        paths = sorted(folder.glob(f"*{SUFFIX}"))
    except (OSError, ConfigError):
        return []
    return [server for path in paths if (server := _read(path)) is not None]


def _write(server: RunningServer, held: contextlib.ExitStack) -> None:
    folder = token_path().parent / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove(*(path for path in folder.glob(f"*{SUFFIX}") if _is_stale(path)))
    name = secrets.token_hex(8)
    temporary, path = folder / f".{name}", folder / f"{name}{SUFFIX}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    held.callback(os.close, fd)
    held.callback(_remove, temporary, path)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(fd, json.dumps(asdict(server)).encode())
    temporary.rename(path)  # held and whole from the moment it has its name


def _read(path: Path) -> RunningServer | None:
    """What a record says, if its server is alive."""
    try:
        fd = _open(path)
        try:
            data = os.read(fd, MOST_BYTES) if _ours(os.fstat(fd)) and _is_locked(fd) else b""
        finally:
            os.close(fd)
        return RunningServer(**json.loads(data))
    except (OSError, ValueError, TypeError):  # TypeError: of another version
        return None


def _is_stale(path: Path) -> bool:
    with contextlib.suppress(OSError):
        fd = _open(path)
        try:
            return not _is_locked(fd)
        finally:
            os.close(fd)
    return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not stat.S_IMODE(found.st_mode) & 0o022


def _remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
