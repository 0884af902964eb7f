"""Where this account's server is and what opens it, found as `orchd serve` itself would find it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from orchd.errors import ConfigError
from orchd.settings.config import Config
from orchd.settings.credentials import find_token
from orchd.settings.sources import load, working_folder


def find_server(
    *,
    url: str | None = None,
    token: str | None = None,
    config_path: Path | None = None,
    token_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """URL and token; what is given stays, the rest comes from flags, environment, configuration and state folder.

    Raises:
        ConfigError: The configuration is wrong, or no server has made a token yet.
    """
    if url is not None and token is not None:
        return url, token
    environ = os.environ if environ is None else environ
    config = load(config_path=config_path, flags={}, environ=environ, cwd=working_folder())
    if token is None:
        token = find_token(config, token_file_flag=token_file, environ=environ).token
    return _configured_url(config) if url is None else url, token


def _configured_url(config: Config) -> str:
    host, port = config.server.host, config.server.port
    if port == 0:
        raise ConfigError("server.port is 0, which means any free port; give the server's address with --url")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # "every address" is none to connect to
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
