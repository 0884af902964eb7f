"""Where this account's server is and what opens it, found as `orchd serve` itself would find it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchd.errors import ConfigError
from orchd.settings.addresses import url_of
from orchd.settings.config import Config
from orchd.settings.credentials import find_token
from orchd.settings.running import RunningServer, running_servers
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

    Without a URL it is the server at the configured address, or else the one that runs, on whatever port; where there
    is a configuration file, it must have been started with that.

    Raises:
        ConfigError: The configuration is wrong, no server has made a token yet, or one of several must be chosen.
    """
    if url is not None and token is not None:
        return url, token
    environ = os.environ if environ is None else environ
    config = load(config_path=config_path, flags={}, environ=environ, cwd=working_folder())
    running = running_servers()
    if url is None:
        named = "ORCHD_HOST" in environ or "ORCHD_PORT" in environ
        url = _configured_url(config) if named else _choose(config, running)
    if token is None:
        announced = next((server.token_file for server in running if server.url == url.rstrip("/")), None)
        token = find_token(config, token_file_flag=token_file, environ=environ, announced=announced).token
    return url, token


def _choose(config: Config, running: Sequence[RunningServer]) -> str:
    """The URL of the server that is meant."""
    at_home = url_of(config.server.host, config.server.port)
    source = None if config.source is None else os.path.realpath(config.source)
    urls = [server.url for server in running if source in (None, server.config)]
    if at_home in urls or not urls:
        return _configured_url(config)
    if len(urls) > 1:
        raise ConfigError(f"several servers run on this account: {', '.join(urls)}; choose one with --url")
    return urls[0]


def _configured_url(config: Config) -> str:
    if config.server.port == 0:
        raise ConfigError(
            "server.port is 0, which means any free port, and no server with this configuration runs on this account; "
            "start one with 'orchd serve', or give its address with --url"
        )
    return url_of(config.server.host, config.server.port)
