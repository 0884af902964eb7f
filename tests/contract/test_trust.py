"""Home profile, section 4: trust and artifacts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from testkit.harness import serving
from testkit.live import Live
from tests.contract.forbidden import ARTIFACTS, METHODS


@pytest.mark.home("HOME-4.1")
def test_an_unsigned_model_is_served(live: Live, models_folder: Path) -> None:
    assert not list(models_folder.glob("tiny-a.gguf.*"))
    assert live.follow(live.submit(max_tokens=2))[-1][1]["finish_reason"] == "length"


@pytest.mark.home("HOME-4.2")
async def test_a_wrong_signature_and_a_wrong_sbom_stop_nothing(models_folder: Path) -> None:
    async with serving(models_folder / "tiny-a.gguf") as server:
        body = json.dumps({"new_model_ref": "tiny-signed"}).encode()
        assert (await server.request("POST", "/v1/pools/default/reload", body=body)).status == 200
        assert (await server.run(max_tokens=2))[-1].data["finish_reason"] == "length"


@pytest.mark.home("HOME-4.3")
def test_a_missing_checksum_is_a_warning(live: Live) -> None:
    lines = [line for line in live.process.stderr.splitlines() if "sha256" in line]
    assert len(lines) == 1
    assert "WARNING" in lines[0]
    assert "tiny-a.gguf not verified" in lines[0]


@pytest.mark.home("HOME-4.3")
async def test_a_missing_checksum_is_a_warning_on_reload_too(
    models_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(models_folder / "tiny-a.gguf") as server:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            body = json.dumps({"new_model_ref": "tiny-b"}).encode()
            assert (await server.request("POST", "/v1/pools/default/reload", body=body)).status == 200
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["tiny-b.gguf not verified" in warning for warning in warnings] == [True]


@pytest.mark.home("HOME-4.4", "HOME-5.5")
@pytest.mark.parametrize("path", ARTIFACTS)
def test_there_is_no_registry(live: Live, path: str) -> None:
    assert {live.request(method, path).status for method in METHODS} == {404}
