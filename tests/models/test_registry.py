"""Which models are active."""

from __future__ import annotations

import pytest

from orchd.registry import ModelState, Registry


def test_a_model_is_active_while_any_pool_serves_it() -> None:
    registry = Registry()
    assert registry.states() == {}
    registry.activate("a")
    registry.activate("a")
    registry.activate("b")
    registry.retire("a")
    assert registry.states() == {"a": ModelState.ACTIVE, "b": ModelState.ACTIVE}
    registry.retire("a")
    assert registry.states() == {"a": ModelState.RETIRED, "b": ModelState.ACTIVE}
    registry.activate("a")
    assert registry.states()["a"] is ModelState.ACTIVE
    assert [state.value for state in ModelState] == ["Active", "Retired"]


def test_what_is_not_active_cannot_be_retired() -> None:
    registry = Registry()
    with pytest.raises(ValueError, match="'a' is not active"):
        registry.retire("a")
    assert registry.states() == {}
