"""The comparison of `make test-architectures`, on models that hold and with faults that it must see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.api import DeviceSpec, ModelSpec
from engines.llamacpp.model import LlamaModel
from engines.llamacpp.prefix_tree import TOKEN_BYTES, Key, Match, PrefixTree
from engines.llamacpp.prefixes import Prefixes
from testkit.alike import compare
from testkit.tiny_gguf import write_tiny_cogvlm, write_tiny_llama, write_tiny_mamba, write_tiny_swa


@pytest.mark.parametrize("write", [write_tiny_llama, write_tiny_swa, write_tiny_mamba, write_tiny_cogvlm])
def test_a_model_answers_the_same_in_a_busy_server_as_alone(write: Callable[[Path], Path], tmp_path: Path) -> None:
    found = compare(ModelSpec(write(tmp_path / "tiny.gguf")))

    assert found.alike, found.told
    assert found.reused > 0


def test_copies_are_among_what_is_compared(tmp_path: Path) -> None:
    assert compare(ModelSpec(write_tiny_llama(tmp_path / "tiny.gguf"))).copies > 0


def test_a_prefix_that_is_none_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    match = PrefixTree.match

    def too_much(tree: PrefixTree[int], key: Key) -> Match[int]:
        found = match(tree, key)
        most = {slot: min(len(key), tree._slots[slot].end) // TOKEN_BYTES for slot in found.slots}
        return found._replace(slots={slot: min(n + 3, most[slot]) if n else 0 for slot, n in found.slots.items()})

    monkeypatch.setattr(PrefixTree, "match", too_much)

    assert not compare(ModelSpec(write_tiny_llama(tmp_path / "tiny.gguf"))).alike


def test_a_window_that_is_gone_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(prefixes: Prefixes, slot: int, keep: int) -> int:
        return keep if prefixes._context.keep(slot, keep) else 0

    monkeypatch.setattr(Prefixes, "_cut", careless)
    monkeypatch.setattr(Prefixes, "_can_keep", lambda prefixes, slot, keep: keep)

    assert not compare(ModelSpec(write_tiny_swa(tmp_path / "tiny.gguf"), swa_full=False)).alike


@pytest.mark.parametrize("count", [3, 5])
def test_a_step_has_the_same_number_of_rows_for_each_slot(count: int, tmp_path: Path) -> None:
    model = LlamaModel(
        ModelSpec(write_tiny_llama(tmp_path / "tiny.gguf"), slots=count, ctx=256, batch=64), DeviceSpec("cpu")
    )
    try:
        assert model._context.n_rows == 64 - 64 % count
    finally:
        model.close()
