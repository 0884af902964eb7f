"""``docs/conformance.md`` against the tests: which clauses of the home profile hold.

``python -m tools.conformance`` (``make conformance``) runs every test with a ``home`` mark and prints the table; it
exits with 1 if a clause has no test that passed, or one that failed. ``--write`` brings the last column of the page up
to date, ``--collect`` writes the marked tests as JSON, and neither runs any.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "conformance.md"
_ROW = re.compile(r"^\| (HOME-\d+\.\d+) \| ([\w ]+) \| (.*?) \| ?(.*?) ?\|$")
_STYLES = {"passed": "green", "FAILED": "bold red", "skipped": "yellow", "NO TEST": "bold red"}

Marked = dict[str, list[str]]
"""Node ids of tests by the clause they are marked with."""


@dataclass(frozen=True)
class Clause:
    """A row of the page."""

    id: str
    level: str
    text: str
    held_by: str


def clauses() -> list[Clause]:
    """The page's rows, in order."""
    return [Clause(*match.groups()) for line in PAGE.read_text().splitlines() if (match := _ROW.match(line))]


class _Recorder:
    """A pytest plugin that notes the marked tests and what becomes of them."""

    def __init__(self) -> None:
        self.marked: Marked = defaultdict(list)
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("home"):
                for clause in mark.args:
                    self.marked[clause].append(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" or (report.when == "call" and report.nodeid not in self.outcomes):
            self.outcomes[report.nodeid] = report.outcome


def _pytest(*args: str) -> tuple[int, _Recorder]:
    recorder = _Recorder()
    code = pytest.main(["-m", "home and not gpu", "-p", "no:cacheprovider", *args, str(ROOT / "tests")], [recorder])
    return code, recorder


def functions(nodeids: Iterable[str]) -> list[str]:
    """``file::test`` of each test function, without the parameters and once each, in order."""
    return list(dict.fromkeys(nodeid.partition("[")[0] for nodeid in nodeids))


def held_by(nodeids: Iterable[str]) -> str:
    """The last cell of a row: names of test functions, after the file that they are in."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for function in functions(nodeids):
        file, _, name = function.partition("::")
        by_file[file.removeprefix("tests/")].append(name.removeprefix("test_"))
    return "; ".join(f"`{file}`: {', '.join(names)}" for file, names in by_file.items())


def page(marked: Mapping[str, list[str]]) -> str:
    """The page as it should be."""
    lines = []
    for line in PAGE.read_text().splitlines():
        match = _ROW.match(line)
        cell = held_by(marked.get(match[1], ())) if match else ""
        lines.append(f"| {match[1]} | {match[2]} | {match[3]} | {cell or 'no test'} |" if match else line)
    return "\n".join(lines) + "\n"


def verdict(outcomes: Iterable[str]) -> str:
    """What several tests of one clause say together."""
    seen = set(outcomes)
    if "failed" in seen:
        return "FAILED"
    if "passed" in seen:
        return "passed"
    return "skipped" if seen else "NO TEST"


def _report(recorder: _Recorder) -> bool:
    """Print the table; whether every clause holds."""
    table = Table("clause", "level", "what it asks for", "tests", "", box=None, pad_edge=False)
    good = True
    for clause in clauses():
        tests = recorder.marked.get(clause.id, [])
        said = verdict(recorder.outcomes.get(test, "failed") for test in tests)
        good = good and said == "passed"
        table.add_row(clause.id, clause.level, clause.text, str(len(tests)), f"[{_STYLES[said]}]{said}[/]")
    unknown = set(recorder.marked) - {clause.id for clause in clauses()}
    for name in sorted(unknown):
        table.add_row(name, "", "not in docs/conformance.md", str(len(recorder.marked[name])), "[bold red]UNKNOWN[/]")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return good and not unknown


def main() -> int:
    """The command; 1 if a clause failed or has no test that can fail."""
    parser = argparse.ArgumentParser(prog="python -m tools.conformance")
    parser.add_argument("--write", action="store_true", help="bring the last column of docs/conformance.md up to date")
    parser.add_argument("--collect", metavar="FILE", type=Path, help="write the marked tests there, as JSON")
    options = parser.parse_args()
    if options.write or options.collect:
        code, recorder = _pytest("--collect-only", "-qq")
        if options.write and code == 0:
            PAGE.write_text(page(recorder.marked), encoding="utf-8")
        if options.collect:
            options.collect.write_text(json.dumps(recorder.marked), encoding="utf-8")
        return int(code)
    code, recorder = _pytest("-q", "--no-header", "--tb=short")
    return 0 if _report(recorder) and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
