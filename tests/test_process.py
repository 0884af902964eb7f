"""What a process that serves asks of Python."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from orchd.errors import ConfigError
from orchd.process import SWITCH_INTERVAL_S
from orchd.serve import serve
from orchd.settings.config import Config, ModelsConfig
from orchd.settings.credentials import Credentials
from testkit.observers import Quiet


@pytest.fixture
def interval() -> float:
    return sys.getswitchinterval()


def test_a_server_hands_the_lock_over_soon(tmp_path: Path, interval: float) -> None:
    config = Config(models=ModelsConfig(roots=(str(tmp_path / "not there"),)))
    with pytest.raises(ConfigError, match="not there"):
        serve(config, Credentials("a-token-of-a-test-0123456789", "tests"), observer=Quiet())
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    assert interval > SWITCH_INTERVAL_S
