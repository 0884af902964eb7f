"""Reading a configuration in tests, and what is said of one that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orchd.errors import ConfigError
from orchd.settings.config import Config

Loader = Callable[..., Config]


def refusal(read: Loader, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert "Object" not in message, "msgspec's own words"
    assert "at `$" not in message.partition(";")[2], "msgspec's own path"
    return message
