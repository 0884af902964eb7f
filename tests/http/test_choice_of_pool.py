"""``POST /v1/tasks`` with several pools: which one a task goes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from testkit.brake import Brake
from testkit.harness import Running, serving, text_of, until
from tests.http.envelope import assert_envelope


async def test_with_several_pools_the_pool_must_be_said(tiny_model_path: Path, other_model: Path) -> None:
    async with serving(tiny_model_path, other_model) as server:
        message = assert_envelope(await server.post(prompt="the"), 400, "INVALID_PARAMS")
        assert "pool_id" in message
        assert "default" in message
        assert "pool1" in message


async def test_pool_id_and_model_ref_each_choose_the_pool(tiny_model_path: Path, other_model: Path) -> None:
    async with serving(tiny_model_path, other_model) as server:
        by_pool = text_of(await server.run(pool_id="pool1", max_tokens=8))
        by_model = [text_of(await server.run(model_ref=ref, max_tokens=8)) for ref in ("other", "other.gguf")]
        default = text_of(await server.run(pool_id="default", max_tokens=8))
        assert await server.total("tasks_enqueued_total", pool_id="pool1") == 3
    assert by_model == [by_pool, by_pool]
    assert by_pool != default


@pytest.mark.parametrize("fields", [{"model_ref": "nope"}, {"model_ref": "other", "pool_id": "default"}])
async def test_a_model_that_no_pool_serves_is_503(
    tiny_model_path: Path, other_model: Path, fields: dict[str, Any]
) -> None:
    async with serving(tiny_model_path, other_model) as server:
        answer = await server.post(prompt="the", **fields)
        assert_envelope(answer, 503, "POOL_UNAVAILABLE")
        assert int(answer.headers["Retry-After"]) >= 1
        assert await server.total("tasks_rejected_total", reason="POOL_UNAVAILABLE") == 1


@pytest.mark.parametrize("ref", ["", "a\0b", "x" * 5000, "../../etc/passwd"], ids=["empty", "NUL", "long", "path"])
async def test_an_odd_model_ref_is_a_refusal(tiny_model_path: Path, ref: str) -> None:
    async with serving(tiny_model_path) as server:
        answer = await server.post(prompt="the", model_ref=ref)
        assert answer.status in (400, 503)
        assert_envelope(answer, answer.status, answer.json()["code"])


async def test_a_model_that_a_ready_pool_serves_does_not_wait_for_another_pool_to_load(
    tiny_model_path: Path, other_model: Path
) -> None:
    brake = Brake()
    brake.slow_file = other_model.name
    brake.may_load.clear()
    async with serving(tiny_model_path, other_model, brake=brake, ready=False) as server:
        ref = tiny_model_path.stem
        await until(lambda: _accepts(server, model_ref=ref), "the first pool is ready")
        unknown = await server.post(prompt="the", model_ref="other")
        assert_envelope(unknown, 503, "POOL_UNREADY")  # it may be the one that is being loaded
        brake.release()


async def _accepts(server: Running, **fields: Any) -> bool:
    return (await server.post(prompt="the", **fields)).status == 202
