"""The account and the files that configurations are read from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchd.settings.config import Config
from orchd.settings.sources import load
from tests.settings.reading import Loader


@pytest.fixture
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
