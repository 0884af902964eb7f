"""A pool whose model cannot be loaded at the start: the others serve, it says why, and a reload brings it up."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engines.api import Footprint, ModelSpec
from testkit import brake
from testkit.harness import Running, serving, until
from testkit.process import call, follow, orchd_serve, submit
from tests.http.envelope import assert_envelope


def damaged(good: Path, path: Path) -> Path:
    """A model whose weights end in the middle."""
    data = good.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


async def health(server: Running) -> tuple[int, str, list[bool]]:
    answer = await server.request("GET", "/health")
    body = answer.json()
    return answer.status, body["status"], [pool["ready"] for pool in body["pools"]]


async def test_a_task_of_another_pool_streams_on_and_the_bad_one_comes_up_by_a_reload(
    tiny_model_path: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = damaged(other_model, tmp_path / "bad.gguf")
    vet, may_vet = brake._vet.__wrapped__, threading.Event()

    def gated(spec: ModelSpec) -> Footprint:
        if spec.path == bad:
            assert may_vet.wait(20)
        return vet(spec)

    monkeypatch.setattr(brake, "_vet", gated)
    async with serving(tiny_model_path, bad, ready=False) as server:

        async def first_serves() -> bool:
            return await health(server) == (503, "loading", [True, False])

        await until(first_serves, "the first pool serves")
        server.brake.allow(5)
        task = await server.submit(pool_id="default", max_tokens=50, ignore_eos=True)
        async with server.listen(task) as listener:
            assert (await anext(listener)).kind == "started"
            may_vet.set()
            await asyncio.wait_for(server.summary, 20)
            assert await health(server) == (503, "degraded", [True, False])
            server.brake.release()
            *_, end = [event async for event in listener]
        assert (end.kind, end.data["finish_reason"]) == ("end", "length")

        refusal = await server.post(prompt="the", pool_id="pool1")
        message = assert_envelope(refusal, 503, "POOL_UNAVAILABLE")
        assert "bad.gguf" in message
        assert str(tmp_path) not in message
        assert int(refusal.headers["Retry-After"]) >= 1
        (failure,) = (pool.failure for pool in server.summary.result().pools if pool.failure is not None)
        assert failure in message

        again = await server.request("POST", "/v1/pools/pool1/reload")
        assert_envelope(again, 422, "RELOAD_FAILED")
        assert again.json()["message"].endswith("; the pool still has no model")
        shutil.copy(other_model, bad.with_suffix(".new"))
        bad.with_suffix(".new").replace(bad)
        repaired = await server.request("POST", "/v1/pools/pool1/reload")
        assert (repaired.status, repaired.json()) == (200, {"pool_id": "pool1", "model_id": "bad"})
        assert await health(server) == (200, "ok", [True, True])
        assert (await server.run(pool_id="pool1", max_tokens=3))[-1].data["finish_reason"] == "length"
        assert await server.total("model_state", model_id="bad", state="Active") == 1


async def test_another_model_may_take_its_place(tiny_model_path: Path, other_model: Path, tmp_path: Path) -> None:
    bad = damaged(other_model, tmp_path / "bad.gguf")
    async with serving(bad, tiny_model_path) as server:  # the first pool, and the others are loaded all the same
        assert await health(server) == (503, "degraded", [False, True])
        answer = await server.request("POST", "/v1/pools/default/reload", new_model_ref="other")
        assert (answer.status, answer.json()) == (200, {"pool_id": "default", "model_id": "other"})
        assert await health(server) == (200, "ok", [True, True])


def config(home: Path, *models: Path) -> tuple[str, ...]:
    pools = "".join(f"[[pools]]\nid = 'pool{n}'\nmodel = '{path}'\nctx = 256\n" for n, path in enumerate(models))
    (home / "orchd.toml").write_text(pools)
    return "--port", "0"


def test_the_ready_screen_the_log_and_orchd_health_tell_which_pool_is_not_served(
    tiny_model_path: Path, other_model: Path, tmp_path: Path
) -> None:
    bad = damaged(other_model, tmp_path / "bad.gguf")
    with orchd_serve(*config(tmp_path, bad, tiny_model_path), home=tmp_path) as process:
        port = process.wait_ready()
        assert "pool0  not served: bad.gguf " in process.stdout
        assert '"pool_id": "pool1"' in process.stdout  # the commands to copy are for one that is
        assert 'ERROR orchd.server: pool "pool0": bad.gguf ' in process.stderr
        assert call(port, "GET", "/health")[0] == 503
        told = subprocess.run(
            [sys.executable, "-m", "orchd", "health", "--url", f"http://127.0.0.1:{port}"],
            env=process.environ,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert "failed to load, see the server's log" in told.stdout
        *_, (kind, _) = follow(port, submit(port, pool_id="pool1", prompt="the", max_tokens=3))
        assert kind == "end"


def test_where_no_pool_can_be_loaded_the_process_ends_and_says_why_of_each(other_model: Path, tmp_path: Path) -> None:
    first, second = damaged(other_model, tmp_path / "first.gguf"), damaged(other_model, tmp_path / "second.gguf")
    with orchd_serve(*config(tmp_path, first, second), home=tmp_path) as process:
        assert process.wait() == 2
    last = process.stderr.splitlines()[-1]
    assert last.startswith('orchd: pool "pool0": first.gguf ')
    assert '; pool "pool1": second.gguf ' in last
    assert "Traceback" not in process.stderr
