"""One server for all examples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.account import ServerProcess, serving


@pytest.fixture(scope="session")
def server(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tmp_path_factory.mktemp("home"), tiny_model_path, "[queue]\ncapacity = 4\n") as process:
        yield process
