"""Home profile, section 10: spec, contracts, tests and code say the same. 10.3 is in test_metrics.py, 10.5 in
test_conformance.py."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchd.schemas import Priority
from testkit.openapi_check import DOCUMENTS, FOLDER, components, operations
from tests.contract.forbidden import words_in
from tools import config_schema

ROOT = Path(__file__).parents[2]


@pytest.mark.home("HOME-10.1")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_openapi_has_no_word_of_what_was_removed(document: str) -> None:
    assert words_in((FOLDER / document).read_text()) == set()


@pytest.mark.home("HOME-10.1")
def test_openapi_has_five_operations() -> None:
    assert {(operation.method, operation.path) for operation in operations()} == {
        ("POST", "/v1/tasks"),
        ("GET", "/v1/tasks/{id}/stream"),
        ("POST", "/v1/pools/{id}/reload"),
        ("GET", "/health"),
        ("GET", "/metrics"),
    }


@pytest.mark.home("HOME-10.2")
def test_config_schema_has_no_word_of_what_was_removed() -> None:
    assert words_in(config_schema.SCHEMA.read_text()) == set()


@pytest.mark.home("HOME-10.2")
def test_there_are_two_priorities_and_config_adds_none() -> None:
    assert [priority.value for priority in Priority] == ["interactive", "batch"]
    assert set(components()["schemas"]["Priority"]["enum"]) == {"interactive", "batch"}
    assert "priorit" not in json.dumps(config_schema.schema()).lower()


def names_in(file: Path) -> Iterator[str]:
    """What a module names: its identifiers and its string constants, docstrings left out."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield node.value


HOUSE = {"drain", "drains", "drained", "draining", "deadline", "topolog", "signature"}
"""Words that mean something else here: draining the queue at shutdown, a drain rate, a moment to stop waiting, the
folder where the kernel lists which threads share a core, a function's parameters."""


@pytest.mark.home("HOME-10.4")
@pytest.mark.parametrize("package", ["engines", "orchd"])
def test_no_identifier_names_what_was_removed(package: str) -> None:
    found = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for name in names_in(file)
        if {word.lower() for word in words_in(name)} - HOUSE
    }
    assert found == set()
