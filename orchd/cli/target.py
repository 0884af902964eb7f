"""The server that a command talks to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orchd.client import Client
from orchd.client.discovery import find_server
from orchd.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """Where a server is, and the token that opens it."""

    url: str
    token: str = field(repr=False)

    def client(self) -> Client:
        """A client for it, to be entered. Raises `ConfigError` if the address or the token cannot be one."""
        try:
            return Client(self.url, token=self.token)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def find_target(url: str | None, config: Path | None, token_file: Path | None) -> Target:
    """The server that the options name. Raises `ConfigError`."""
    return Target(*find_server(url=url, config_path=config, token_file=token_file))
