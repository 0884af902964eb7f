"""The map in ``docs/architecture.md`` is the tree, and imports follow it: each row imports only rows above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("engines", "orchd")
ONLY_IMPORTERS = {
    "llama_cpp": {f"engines/llamacpp/native/{name}.py" for name in ("library", "model", "sampler", "context", "gpus")},
    "prometheus_client": {"orchd/metrics.py"},
}
"""Libraries that one module, or those of one folder, keep from all others."""

ROW = re.compile(r"^\| `((?:engines|orchd)/[\w/]+\.py)` \| (.+) \|$", re.MULTILINE)


def rows() -> list[str]:
    """The modules of the map, in order."""
    return [match[1] for match in ROW.finditer(PAGE.read_text())]


def modules() -> list[str]:
    """The modules there are. An ``__init__.py`` that only has a docstring or a version is no module of the map."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return [str(file.relative_to(ROOT)) for file in files if file.name != "__init__.py" or imports(file)]


@dataclass(frozen=True)
class Import:
    """What a statement imports: ``orchd.http`` or, where that is a module, ``orchd.http.errors``."""

    name: str
    line: int
    at_run_time: bool


def imports(file: Path) -> list[Import]:
    """Every import of a file, wherever it stands; those for type checkers only are marked."""
    return list(_imports(ast.parse(file.read_text()), at_run_time=True))


def _imports(node: ast.AST, *, at_run_time: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _imports(ast.Module([statement], []), at_run_time=False)
            for statement in child.orelse:
                yield from _imports(ast.Module([statement], []), at_run_time=at_run_time)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_run_time)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import in line {child.lineno}"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, at_run_time)
        else:
            yield from _imports(child, at_run_time=at_run_time)


def file_of(name: str) -> str | None:
    """The module of this house that an imported name is, or is in."""
    parts = name.split(".")
    if parts[0] not in PACKAGES:
        return None
    for count in range(len(parts), 0, -1):
        path = "/".join(parts[:count])
        if (ROOT / f"{path}.py").is_file():
            return f"{path}.py"
        if (ROOT / path / "__init__.py").is_file():
            return f"{path}/__init__.py"
    raise AssertionError(f"{name} is nowhere")


def test_every_module_is_on_the_map() -> None:
    assert sorted(set(modules()) - set(rows())) == []


def test_every_row_of_the_map_is_a_module() -> None:
    assert [row for row in rows() if not (ROOT / row).is_file()] == []


def test_no_module_is_on_the_map_twice() -> None:
    assert len(rows()) == len(set(rows()))


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_what_stands_above_it(module: str) -> None:
    order = {row: number for number, row in enumerate(rows())}
    if module not in order:
        pytest.skip("not on the map, which another test fails for")
    wrong = []
    for found in imports(ROOT / module):
        target = file_of(found.name)
        if target is None or target == module or (target.endswith("__init__.py") and target not in order):
            continue
        if order.get(target, len(order)) >= order[module]:
            wrong.append(f"{module}:{found.line} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("module", [module for module in modules() if module.startswith("engines/")])
def test_engines_know_nothing_of_orchd(module: str) -> None:
    assert [found.name for found in imports(ROOT / module) if found.name.split(".")[0] == "orchd"] == []


BRIDGE = re.compile(r"orchd/(openai|client|settings)/|orchd/(errors|process|schemas)\.py")
OF_ANY_SERVER = {f"orchd/http/{name}.py" for name in ("auth", "body", "connection", "errors", "middleware", "sse")}


@pytest.mark.parametrize("module", [module for module in modules() if module.startswith("orchd/openai/")])
def test_the_bridge_is_a_client_and_knows_no_server(module: str) -> None:
    seen = {file_of(found.name) for found in imports(ROOT / module)} - {None, "orchd/http/__init__.py"}
    assert {file for file in seen if file and not BRIDGE.match(file)} <= OF_ANY_SERVER


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_a_library_has_one_importer(library: str) -> None:
    importers = {
        module
        for module in modules()
        if any(found.name.split(".")[0] == library and found.at_run_time for found in imports(ROOT / module))
    }
    assert importers == ONLY_IMPORTERS[library]


OF_HTTP = re.compile(r"orchd/(http|client)/")


@pytest.mark.parametrize("module", [module for module in modules() if not OF_HTTP.match(module)])
def test_http_statuses_live_in_http(module: str) -> None:
    """No status appears elsewhere, as a number or as `http.HTTPStatus`; the client reads them, so it may know them."""
    tree = ast.parse((ROOT / module).read_text())
    statuses = {202, 401, 403, 404, 405, 409, 422, 429, 503}  # the others are round numbers of other things, too
    numbers = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is int]
    wrong = [f"line {node.lineno}: {node.value}" for node in numbers if node.value in statuses]
    assert wrong == []
    found = {found.name for found in imports(ROOT / module) if found.name.startswith("http.")}
    assert found == ({"http.client"} if module == "orchd/cli/health.py" else set())  # a client without `orchd.client`


@pytest.mark.parametrize("module", [module for module in modules() if module.startswith("orchd/")])
def test_an_engine_is_seen_through_its_seam(module: str) -> None:
    """Only what puts the parts together names llama.cpp's engine; all else knows the modules beside it."""
    seen = {file_of(found.name) for found in imports(ROOT / module) if found.name.split(".")[0] == "engines"}
    if module not in ("orchd/serve.py", "orchd/cli/catalog.py", "orchd/cli/check.py", "orchd/cli/versions.py"):
        assert seen <= {"engines/api.py", "engines/errors.py", "engines/gguf_files.py", "engines/__init__.py"}


@pytest.mark.parametrize("module", [*modules(), "engines/__init__.py", "orchd/__init__.py"])
def test_a_module_says_what_it_is(module: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / module).read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":")) or len(docstring.splitlines()) > 1
