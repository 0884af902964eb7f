"""What a process that serves asks of Python."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchd.errors import ConfigError
from orchd.process import SWITCH_INTERVAL_S
from orchd.serve import serve
from orchd.settings.config import Config, ModelsConfig
from orchd.settings.credentials import Credentials
from testkit.observers import Quiet


@pytest.fixture
def interval() -> Iterator[float]:
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(0.005)  # a server may have run in this process
    yield 0.005
    sys.setswitchinterval(before_s)


def test_a_server_hands_the_lock_over_soon(tmp_path: Path, interval: float) -> None:
    config = Config(models=ModelsConfig(roots=(str(tmp_path / "not there"),)))
    with pytest.raises(ConfigError, match="not there"):
        serve(config, Credentials("a-token-of-a-test-0123456789", "tests"), observer=Quiet())
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    assert interval > SWITCH_INTERVAL_S
