"""The clauses of the home profile and the tests that hold them are the same list."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import conformance
from tools.conformance import ROOT, Marked


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Marked:
    """Collected by pytest itself, from the whole suite, whatever part of it runs now."""
    target = tmp_path_factory.mktemp("conformance") / "marked.json"
    command = [sys.executable, "-m", "tools.conformance", "--collect", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: Marked = json.loads(target.read_text())
    return found


@pytest.mark.home("HOME-10.5")
def test_every_clause_has_a_test(marked: Marked) -> None:
    assert [clause.id for clause in conformance.clauses() if not marked.get(clause.id)] == []


@pytest.mark.home("HOME-10.5")
def test_no_test_names_a_clause_that_is_not_there(marked: Marked) -> None:
    assert set(marked) - {clause.id for clause in conformance.clauses()} == set()


@pytest.mark.home("HOME-10.5")
def test_the_page_names_the_tests_that_there_are(marked: Marked) -> None:
    stale = "run `python -m tools.conformance --write`"
    assert conformance.PAGE.read_text() == conformance.page(marked), stale


@pytest.mark.home("HOME-10.5")
def test_the_page_has_every_keyword_of_the_profile() -> None:
    """As many clauses of each level as the profile has, counted by hand: it is not in this repository."""
    levels = [clause.level for clause in conformance.clauses()]
    assert {level: levels.count(level) for level in set(levels)} == {
        "MUST": 21,
        "MUST NOT": 13,
        "SHOULD": 5,
        "MAY": 1,
        "align": 5,
    }
    ids = [clause.id for clause in conformance.clauses()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ([], "NO TEST"),
        (["passed"], "passed"),
        (["passed", "skipped"], "passed"),
        (["passed", "failed"], "FAILED"),
        (["skipped"], "skipped"),
    ],
)
def test_a_clause_holds_if_a_test_passed_and_none_failed(outcomes: list[str], said: str) -> None:
    assert conformance.verdict(outcomes) == said


def test_what_fails_and_what_is_missing_makes_the_run_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = conformance.clauses()
    recorder = conformance._Recorder()
    recorder.marked = {clause.id: ["t"] for clause in held}
    recorder.outcomes = {"t": "passed", "u": "failed"}
    assert conformance._report(recorder)
    recorder.marked[held[3].id] = ["t", "u"]
    assert not conformance._report(recorder)
    recorder.marked[held[3].id] = []
    assert not conformance._report(recorder)
    recorder.marked |= {held[3].id: ["t"], "HOME-99.1": ["t"]}
    assert not conformance._report(recorder)
