"""Requests made up from the OpenAPI documents, right ones and wrong ones, with the token and without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance, response_schema_conformance

from testkit.process import TOKEN, orchd_serve, submit
from testkit.tiny_gguf import write_tiny_llama

FOLDER = Path(__file__).parents[2] / "openapi"
OPERATIONS: dict[str, Any] = {
    operation.label: operation
    for name in ("data.yaml", "control.yaml")
    for found in schemathesis.openapi.from_path(FOLDER / name).get_all_operations()
    if (operation := found.ok())  # type: ignore[union-attr]
}
EXAMPLES = 25

DEPENDS_ON_THE_SERVER: list[CheckFunction] = [positive_data_acceptance]
"""A pool's name, a model's, exactly one of prompt and messages, what fits a slot: no schema says what is accepted."""

ON_PURPOSE: list[CheckFunction] = [not_a_server_error]
"""A 503 is an answer: no pool serves that model."""

BY_OURSELVES: list[CheckFunction] = [response_schema_conformance]
"""Events: ``testkit/openapi_check.py`` holds them against ``x-sse-events`` in every test of the harness."""


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        url: Where it is.
        ids: What an ``{id}`` in a path may be, by operation, besides what is made up.
    """

    url: str
    ids: dict[str, str]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    home = tmp_path_factory.mktemp("fuzzed")
    model = write_tiny_llama(home / "tiny-llama.gguf")
    (home / "orchd.toml").write_text(f"[[pools]]\nmodel = '{model}'\nctx = 4096\nthreads = 1\n")
    with orchd_serve("--port", "0", home=home) as process:
        port = process.wait_ready()
        task_id = submit(port, prompt="the", max_tokens=3)
        yield Target(
            f"http://127.0.0.1:{port}",
            {"GET /v1/tasks/{id}/stream": task_id, "POST /v1/pools/{id}/reload": "default"},
        )
        assert "Traceback" not in process.stderr, process.stderr


def test_every_route_is_fuzzed() -> None:
    assert len(OPERATIONS) == 5


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize("token", [TOKEN, None], ids=["token", "no token"])
def test_every_answer_is_what_the_document_says(
    target: Target, label: str, mode: GenerationMode, token: str | None
) -> None:
    operation = OPERATIONS[label]
    if mode is GenerationMode.NEGATIVE and label in ("GET /health", "GET /metrics"):
        pytest.skip("it takes no parameter: nothing about it can be wrong")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def fuzz(case: Any) -> None:
        if label in target.ids and mode is GenerationMode.POSITIVE and sum(statuses.values()) % 2:
            case.path_parameters = {"id": target.ids[label]}
        response = case.call(base_url=target.url, headers=headers)
        statuses[response.status_code] += 1
        excluded = DEPENDS_ON_THE_SERVER + ON_PURPOSE * (response.status_code == 503)
        excluded += BY_OURSELVES * (response.status_code == 200 and label.endswith("/stream"))
        case.validate_response(response, headers=headers, excluded_checks=excluded)
        assert token is not None or response.status_code in (400, 401, 405)

    fuzz()
    print(f"{label}: {dict(statuses)}")
