"""`orchd models`: what a reload may ask for, and whether it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchd.machine import gpus, memory
from tests.cli.shell import one_line, orchd


@pytest.fixture(autouse=True)
def folder(home: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, one of them in a folder, and what only looks like one."""
    monkeypatch.setattr(gpus, "find_gpus", list)
    models = home / "models"
    (models / "more").mkdir(parents=True)
    for name in ("one.gguf", "more/two.gguf"):
        (models / name).write_bytes(tiny_model_path.read_bytes())
    (models / "broken.gguf").write_bytes(b"<html>")
    (models / "notes.txt").write_text("none")
    config = f'[models]\nroots = ["models"]\n[[pools]]\nmodel = "{tiny_model_path}"\ndevices = ["cpu"]\nctx = 64\n'
    (home / "orchd.toml").write_text(config)
    return models


def test_every_model_in_the_roots_is_listed_with_its_size(tiny_model_path: Path) -> None:
    result = orchd("models", "--json")
    assert result.exit_code == 0, result.output
    entries = {entry["name"]: entry for entry in json.loads(result.stdout)}
    assert set(entries) == {"one", "more/two", "broken", tiny_model_path.stem}
    assert entries["more/two"]["size_bytes"] == tiny_model_path.stat().st_size
    assert entries["one"]["fits"]
    assert "not a GGUF file" in entries["broken"]["problem"]


def test_people_get_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "fits" in orchd("models").stdout
    monkeypatch.setattr(memory, "free_bytes", lambda place: 1)
    shown = orchd("models").stdout
    assert "does not fit now" in shown
    assert "free the memory of the model that it replaces" in shown


def test_a_folder_on_the_command_line(folder: Path) -> None:
    names = [
        entry["name"] for entry in json.loads(orchd("models", "--models-dir", str(folder / "more"), "--json").stdout)
    ]
    assert "two" in names
    assert "one" not in names


def test_a_pool_that_is_none_is_one_line_and_2() -> None:
    result = orchd("models", "--pool", "x")
    assert result.exit_code == 2
    assert "available: default" in one_line(result.stderr)
