"""Which models are active."""

from __future__ import annotations

import pytest

from orchd.models.registry import RETIRED_KEPT, ModelState, Registry


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


def test_of_the_retired_only_the_last_are_remembered_and_of_the_active_all() -> None:
    registry = Registry()
    pools = [f"pool {number}" for number in range(20)]
    for model in pools:
        registry.activate(model)
    for number in range(30):
        registry.activate(f"model {number}")
        registry.retire(f"model {number}")
    states = registry.states()
    assert [model for model, state in states.items() if state is ModelState.ACTIVE] == pools
    retired = [model for model, state in states.items() if state is ModelState.RETIRED]
    assert retired == [f"model {number}" for number in range(30 - RETIRED_KEPT, 30)]


def test_a_model_that_comes_back_is_retired_anew() -> None:
    registry = Registry()
    for model in ("a", "b", "a", *"cdefghi"):
        registry.activate(model)
        registry.retire(model)
    assert list(registry.states()) == list("bacdefghi")[-RETIRED_KEPT:]
