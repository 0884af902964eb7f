"""Home profile, section 3: lifecycle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchd.models.registry import ModelState
from testkit.harness import Running, serving, text_of
from testkit.live import Live
from tests.contract.forbidden import CANARIES, DRAINS, METHODS


async def reload(server: Running, model: str | None = None, **more: Any) -> Any:
    body = b"" if model is None and not more else json.dumps({"new_model_ref": model, **more}).encode()
    return await server.request("POST", "/v1/pools/default/reload", body=body)


async def states(server: Running) -> dict[tuple[str, str], float]:
    found = {}
    for (name, labels), value in (await server.metrics()).items():
        if name == "model_state":
            of = dict(labels)
            found[of["model_id"], of["state"]] = value
    return found


@pytest.mark.home("HOME-3.1")
async def test_a_model_is_active_then_retired(models_folder: Path) -> None:
    assert [state.value for state in ModelState] == ["Active", "Retired"]
    async with serving(models_folder / "tiny-a.gguf") as server:
        assert await states(server) == {("tiny-a", "Active"): 1, ("tiny-a", "Retired"): 0}
        assert (await reload(server, "tiny-b")).status == 200
        assert await states(server) == {
            ("tiny-a", "Active"): 0,
            ("tiny-a", "Retired"): 1,
            ("tiny-b", "Active"): 1,
            ("tiny-b", "Retired"): 0,
        }
        assert (await reload(server, "tiny-a")).status == 200
        assert (await states(server))["tiny-a", "Active"] == 1


@pytest.mark.home("HOME-3.2")
@pytest.mark.parametrize(
    "fields",
    [{"state": "Draft"}, {"canary": True}, {"percent": 5}, {"rollout": {"percent": 5}}, {"deprecate": True}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_reload_takes_no_state_and_no_percentage(live: Live, fields: dict[str, Any]) -> None:
    answer = live.request("POST", "/v1/pools/default/reload", json.dumps(fields).encode())
    assert answer.status == 400
    assert next(iter(fields)) in answer.json()["message"]


@pytest.mark.home("HOME-3.2")
async def test_a_reload_is_whole_never_a_part_of_the_replicas(models_folder: Path) -> None:
    async with serving(models_folder / "tiny-a.gguf", pool={"devices": ["cpu", "cpu"], "slots": 1}) as server:
        old = [text_of(await server.run(max_tokens=8)) for _ in range(2)]
        assert (await reload(server, "tiny-b")).status == 200
        ids = [await server.submit(max_tokens=8) for _ in range(6)]
        new = {text_of(await server.events(task_id)) for task_id in ids}
    assert len(new) == 1
    assert new.isdisjoint(old)


@pytest.mark.home("HOME-3.3")
async def test_a_reload_is_atomic_and_what_runs_ends_on_its_own_model(models_folder: Path) -> None:
    async with serving(models_folder / "tiny-a.gguf", pool={"slots": 1}) as server:
        alone = text_of(await server.run(max_tokens=12))
        server.brake.hold()
        running = await server.submit(max_tokens=12)
        await server.started(1)
        waiting = await server.submit(max_tokens=12)
        assert (await reload(server, "tiny-b")).json() == {"pool_id": "default", "model_id": "tiny-b"}
        server.brake.release()
        assert text_of(await server.events(running)) == alone
        on_new = await server.events(waiting)
        assert on_new[-1].data["finish_reason"] == "length"
        assert text_of(on_new) == text_of(await server.run(max_tokens=12)) != alone


@pytest.mark.home("HOME-3.3")
async def test_a_failed_reload_changes_nothing(models_folder: Path) -> None:
    async with serving(models_folder / "tiny-a.gguf") as server:
        before = text_of(await server.run(max_tokens=8)), await states(server)
        answer = await reload(server, "garbage")
        assert (answer.status, answer.json()["code"]) == (422, "RELOAD_FAILED")
        assert "tiny-a" in answer.json()["message"]
        assert (text_of(await server.run(max_tokens=8)), await states(server)) == before
        assert (await server.request("GET", "/health")).status == 200


@pytest.mark.home("HOME-3.4", "HOME-5.5")
@pytest.mark.parametrize("path", DRAINS + CANARIES)
def test_there_are_no_drains_and_no_canaries(live: Live, path: str) -> None:
    assert {live.request(method, path).status for method in METHODS} == {404}
