"""From what a request calls a model to a file, and what is said of files that are not usable."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.gguf_files import parts
from orchd.errors import ConfigError, InvalidParams
from orchd.models import references
from orchd.models.references import model_id, resolve
from tests.models.tree import put, put_split


def refusal(reference: str, *roots: Path) -> str:
    """What a request is told; never more of a path than the request itself said."""
    with pytest.raises(InvalidParams) as caught:
        resolve(reference, roots)
    message = str(caught.value)
    assert "\n" not in message
    for root in roots:
        assert str(root.parent) not in message.replace(repr(reference), "")
    return message


# What a reference may be


@pytest.mark.parametrize("reference", ["llama.Q4.gguf", "llama.Q4", "./llama.Q4.gguf"])
def test_a_file_name_or_its_stem(root: Path, reference: str) -> None:
    path = put(root / "llama.Q4.gguf")
    assert resolve(reference, [root]) == path


def test_a_path_from_a_root_or_an_absolute_one_inside_it(root: Path) -> None:
    path = put(root / "sub" / "llama.gguf")
    for reference in ("sub/llama.gguf", "sub/llama", str(path), str(path)[:-5]):
        assert resolve(reference, [root]) == path
    assert "is not in the model roots" in refusal("llama", root), "names are not looked for in folders below"


def test_every_root_is_searched(root: Path, tmp_path: Path) -> None:
    path = put(tmp_path / "more" / "llama.gguf")
    assert resolve("llama", [root, tmp_path / "not there", tmp_path / "more"]) == path


def test_a_file_comes_before_a_stem_and_a_folder_does_not(root: Path) -> None:
    plain, gguf = put(root / "llama"), put(root / "llama.gguf")
    assert resolve("llama", [root]) == plain
    plain.unlink()
    plain.mkdir()
    assert resolve("llama", [root]) == gguf


def test_one_file_in_overlapping_roots_is_not_ambiguous(root: Path) -> None:
    path = put(root / "sub" / "llama.gguf")
    (root / "llama.gguf").symlink_to(path)
    assert resolve("llama", [root / "sub", root]) == path


def test_several_matches_are_named(root: Path, tmp_path: Path) -> None:
    put(root / "llama.gguf")
    put_split(root, "llama", 2)
    message = refusal("llama", root)
    assert "'llama' is ambiguous: llama-00001-of-00002.gguf, llama.gguf; use the full name or path" in message
    put(tmp_path / "more" / "qwen.gguf")
    put(root / "qwen.gguf")
    assert "'qwen' is ambiguous: qwen.gguf exists in 2 of the model roots" in refusal("qwen", root, tmp_path / "more")


def test_links_are_followed_inside_the_roots_and_keep_the_models_name(root: Path) -> None:
    put(root / "blobs" / "0a1b2c")
    (root / "snapshot").mkdir()
    (root / "snapshot" / "llama.gguf").symlink_to("../blobs/0a1b2c")
    (root / "latest").symlink_to("snapshot")
    path = resolve("latest/llama", [root])
    assert path == root / "snapshot" / "llama.gguf"
    assert model_id(path) == "llama"


def test_a_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    path = put(root / "llama.gguf")
    (tmp_path / "link").symlink_to(root)
    assert resolve("llama", [tmp_path / "link"]) == path
    assert resolve(str(tmp_path / "link" / "llama.gguf"), [root]) == path


# What a reference may not be


def test_what_lies_outside_is_refused_whether_it_exists_or_not(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "secret.gguf")
    for name in ("secret.gguf", "secret", "no-such-file"):
        message = refusal(str(tmp_path / name), root)
        assert message.endswith("is outside the model roots; name a file inside them (models.roots)")
    for reference in ("../secret.gguf", "sub/../../secret", ".."):
        assert "must not contain '..'; name a file inside" in refusal(reference, root)


def test_links_that_lead_out_are_refused(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "outside" / "secret.gguf")
    (root / "file.gguf").symlink_to(tmp_path / "outside" / "secret.gguf")
    (root / "folder").symlink_to(tmp_path / "outside")
    first = put_split(root, "split", 2, without=[2])
    (root / "split-00002-of-00002.gguf").symlink_to(tmp_path / "outside" / "secret.gguf")
    assert "file.gguf is a link to a file outside the model roots; name a file inside" in refusal("file", root)
    assert "'folder/secret' is not in the model roots" in refusal("folder/secret", root)
    assert "split-00002-of-00002.gguf is a link to a file outside" in refusal(first.name, root)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("", "does not name a file; use a GGUF file's name or path"),
        ("  ", "does not name a file"),
        (".", "does not name a file"),
        ("/", "does not name a file"),
        ("a\0b", "contains a NUL byte"),
        ("\ud800", "is not valid text"),
        ("x" * 256, "is too long; use a path of at most 4096 bytes, each name in it of at most 255"),
        ("é" * 128, "is too long"),
        ("x/" * 2100, "is too long"),
        ("missing.gguf", "'missing.gguf' is not in the model roots; name a GGUF file inside them"),
        ("llama.ggfu", "'llama.ggfu' is not in the model roots; did you mean llama.gguf?"),
        ("llama.gguf/x", "is not in the model roots"),
        ("folder", "'folder' is a folder; name a GGUF file in it"),
        ("fifo", "fifo is not a regular file; name a GGUF file"),
        ("broken", "broken.gguf is a broken link or out of reach"),
        ("loop", "loop is a broken link or out of reach"),
    ],
)
def test_a_reference_that_names_no_usable_file(root: Path, reference: str, problem: str) -> None:
    put(root / "llama.gguf")
    (root / "folder").mkdir()
    os.mkfifo(root / "fifo")
    (root / "broken.gguf").symlink_to("nowhere")
    (root / "loop").symlink_to("loop")
    assert problem in refusal(reference, root)


def test_a_long_reference_is_cut_in_the_message(root: Path) -> None:
    assert len(refusal("x" * 100_000, root)) < 300


def test_without_roots_nothing_resolves() -> None:
    assert "is not in the model roots" in refusal("llama")
    assert "is outside the model roots" in refusal("/llama.gguf")


def test_a_device_is_refused() -> None:
    with pytest.raises(InvalidParams, match="null is not a regular file"):
        resolve("null", [Path("/dev")])


def test_a_file_without_read_permission(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root / "llama.gguf").chmod(0)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    assert "llama.gguf is not readable by the server; fix it with: chmod +r llama.gguf" in refusal("llama", root)


names = st.sampled_from(
    ["a", "b", "c.gguf", "c", "out", "secret", "secret.gguf", "..", ".", "", "d-00001-of-00002.gguf", "d"]
)
targets = st.lists(
    st.sampled_from(["a", "b", "c.gguf", "out", "..", ".", "../outside", "ROOT", "OUT"]),
    min_size=1,
    max_size=3,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a tree of files for each example
@given(
    links=st.dictionaries(st.sampled_from(["a", "b", "a/x", "out", "d-00002-of-00002.gguf"]), targets, max_size=4),
    start=st.sampled_from(["", "", "/", "ROOT/", "OUT/"]),
    segments=st.lists(names | st.text(max_size=6), min_size=1, max_size=4),
)
def test_no_reference_leads_out_of_the_roots(links: dict[str, list[str]], start: str, segments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = Path(os.path.realpath(folder))
        root, outside = base / "root", base / "outside"
        for path in (
            root / "c.gguf",
            root / "d-00001-of-00002.gguf",
            outside / "secret.gguf",
            outside / "c.gguf",
        ):
            put(path)

        def place(text: str) -> str:
            return text.replace("ROOT", str(root)).replace("OUT", str(outside))

        for link, target in links.items():
            if os.path.isdir((root / link).parent) and not os.path.lexists(root / link):
                (root / link).symlink_to(place("/".join(target)))
        reference = place(start) + "/".join(segments)
        message = ""
        try:
            found = resolve(reference, [root])
        except InvalidParams as error:
            message = str(error)
        else:
            assert found.is_relative_to(root)
            assert Path(os.path.realpath(found)).is_relative_to(root)
            assert found.is_file()
        assert folder in reference or folder not in message


@settings(deadline=None)
@given(st.text())
def test_any_text_resolves_or_is_refused(reference: str) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.raises(InvalidParams):
        resolve(reference, [Path(folder)])


# Split models


@pytest.mark.parametrize("reference", ["big", "big-00001-of-00003", "big-00001-of-00003.gguf"])
def test_a_split_model_is_its_first_part(root: Path, reference: str) -> None:
    first = put_split(root, "big", 3)
    assert resolve(reference, [root]) == first
    assert model_id(first) == "big"
    assert [path.name for path in parts(first)] == [f"big-0000{part}-of-00003.gguf" for part in (1, 2, 3)]


def test_a_later_part_is_told_of_the_first(root: Path) -> None:
    put_split(root, "big", 3)
    message = refusal("big-00002-of-00003.gguf", root)
    assert "is part 2 of a split model; name its first part, big-00001-of-00003.gguf" in message


@pytest.mark.parametrize("reference", ["big", "big-00001-of-00003"])
def test_missing_parts_are_named(root: Path, reference: str) -> None:
    put_split(root, "big", 3, without=[2, 3])
    assert "is missing big-00002-of-00003.gguf, big-00003-of-00003.gguf; put every part in" in refusal(reference, root)


def test_a_missing_first_part_is_named(root: Path) -> None:
    put_split(root, "big", 2, without=[1])
    assert "'big' is missing big-00001-of-00002.gguf" in refusal("big", root)


def test_an_absurd_number_of_parts_is_told_in_short(root: Path) -> None:
    put(root / "x-00001-of-99999.gguf")
    assert "and 99995 more; put every part" in refusal("x", root)


def test_a_name_that_only_looks_split_is_an_ordinary_one(root: Path) -> None:
    path = put(root / "x-00003-of-00002.gguf")
    assert resolve("x-00003-of-00002", [root]) == path
    assert parts(path) == (path,)


def test_a_root_that_is_not_a_folder_is_told(root: Path) -> None:
    references.check_roots([root])
    with pytest.raises(ConfigError, match=r"models\.roots: .*/none is not a readable folder; create it, or remove it"):
        references.check_roots([root, root / "none"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama.Q4_K_M.gguf", "llama.Q4_K_M"),
        ("big-00001-of-00002.gguf", "big"),
        ("sha256-0a1b.2c", "sha256-0a1b.2c"),
        (".gguf", ".gguf"),
        (os.fsdecode(b"\xff.gguf"), "\ufffd"),
    ],
)
def test_a_models_id(name: str, expected: str) -> None:
    assert model_id(Path("/models") / name) == expected
