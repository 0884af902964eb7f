"""Real servers for the clauses: one in a process of its own for the whole session, and a folder of models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.live import Live, serving
from testkit.tiny_gguf import write_tiny_llama
from tools.metrics_lint import pool_toml


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny-a`` and ``tiny-b``, unsigned; ``tiny-signed`` with a signature and an SBOM that are wrong; ``garbage``."""
    folder = tmp_path_factory.mktemp("contract-models")
    for seed, name in enumerate(("tiny-a", "tiny-b", "tiny-signed")):
        write_tiny_llama(folder / f"{name}.gguf", seed=seed)
    for suffix in ("sig", "asc", "minisig", "sbom.json", "intoto.jsonl"):
        (folder / f"tiny-signed.gguf.{suffix}").write_text("this verifies nothing\n")
    (folder / "garbage.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 16)
    return folder


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, models_folder: Path) -> Iterator[Live]:
    """``orchd serve``: one CPU pool with one slot, room for two waiting tasks. Tests leave it idle, with its model."""
    folder = tmp_path_factory.mktemp("live")
    with serving(folder, pool_toml(models_folder / "tiny-a.gguf", capacity=2)) as server:
        yield server
