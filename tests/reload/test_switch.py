"""Reloads over HTTP with real models: what those who stream, wait and ask see of it."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from gguf import GGUFWriter

from engines.errors import LoadFailed
from engines.llamacpp.engine import LlamaCppEngine
from engines.llamacpp.model import LlamaModel
from orchd.errors import ConfigError
from testkit import damaged_gguf, tiny_gguf
from testkit.brake import Brake
from testkit.harness import TOKEN, Answer, Event, Running, engine_text, serving, text_of, until
from testkit.tiny_gguf import PIECES, write_tiny_llama, write_tiny_swa

PROMPTS = ("the people of the world", "she said that", "one two three")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Models ``a``, and ``b`` with other weights, another vocabulary and another template."""
    folder = tmp_path / "models"
    folder.mkdir()
    write_tiny_llama(folder / "a.gguf", seed=1)
    write_tiny_llama(folder / "b.gguf", seed=2, pieces=PIECES[::-1])
    return folder


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that are closed, one for each replica."""
    names: list[str] = []
    close = LlamaModel.close

    def noting(self: LlamaModel) -> None:
        names.append(self._spec.path.name)
        close(self)

    monkeypatch.setattr(LlamaModel, "close", noting)
    return names


async def reload(server: Running, ref: str | None = None, *, pool: str = "default") -> Answer:
    path = f"/v1/pools/{pool}/reload"
    if ref is None:
        return await server.request("POST", path)
    return await server.request("POST", path, new_model_ref=ref)


async def reloaded(server: Running, ref: str | None = None) -> None:
    answer = await reload(server, ref)
    assert answer.status == 200, answer.body
    if ref is not None:
        assert answer.json() == {"pool_id": "default", "model_id": ref}


async def states(server: Running) -> dict[str, str]:
    samples = {
        tuple(sorted(labels)): v for (name, labels), v in (await server.metrics()).items() if name == "model_state"
    }
    found = {dict(labels)["model_id"]: dict(labels)["state"] for labels, value in samples.items() if value == 1}
    assert len(samples) == 2 * len(found), "each model has one state, and a sample for both"
    return found


def failure(events: list[Event]) -> dict[str, Any]:
    assert [event.kind for event in events] == ["end"], "it never started"
    assert events[0].data["finish_reason"] == "error"
    error: dict[str, Any] = events[0].data["error"]
    return error


# --- the switch


async def test_running_streams_end_on_the_old_model_while_new_ones_run_on_the_new(
    root: Path, closed: list[str]
) -> None:
    a, b = root / "a.gguf", root / "b.gguf"
    alone = {(m, p): engine_text(m, p, max_tokens=40) for m in (a, b) for p in PROMPTS}
    closed.clear()
    async with serving(a, pool={"devices": ["cpu", "cpu"]}) as server:
        server.brake.allow(10)
        old = [await server.submit(prompt=prompt, max_tokens=40) for prompt in PROMPTS[:2]]
        streams = [asyncio.create_task(server.events(task)) for task in old]
        await server.started(2)
        await reloaded(server, "b")
        assert (await server.request("GET", "/health")).json()["pools"][0]["model_id"] == "b"
        assert await states(server) == {"a": "Retired", "b": "Active"}
        new = [await server.submit(prompt=prompt, max_tokens=40) for prompt in PROMPTS[:2]]
        await server.started(4)
        assert closed == [], "each replica still has a task on the old model"
        server.brake.release()
        assert [text_of(await stream) for stream in streams] == [alone[a, prompt] for prompt in PROMPTS[:2]]
        assert [text_of(await server.events(task)) for task in new] == [alone[b, prompt] for prompt in PROMPTS[:2]]
        await until(lambda: closed == ["a.gguf"] * 2, "the old model is closed")


async def test_tasks_that_wait_start_on_the_new_model_with_its_vocabulary_and_template(root: Path) -> None:
    write_tiny_llama(root / "b.gguf", seed=2, pieces=PIECES[::-1], chat_template="Q: {{ messages[0].content }} A:")
    chat = [{"role": "user", "content": "good day"}]
    async with serving(root / "a.gguf", pool={"devices": ["cpu", "cpu"], "slots": 1}) as server:
        server.brake.hold()
        running = [await server.submit(prompt="the", max_tokens=20) for _ in range(2)]
        waiting = [await server.submit(prompt=prompt, max_tokens=30) for prompt in PROMPTS]
        waiting.append(await server.submit(messages=chat, max_tokens=30))
        streams = [asyncio.create_task(server.events(task)) for task in (*running, *waiting)]
        await reloaded(server, "b")
        server.brake.release()
        events = [await stream for stream in streams]
        assert all(each[-1].data["finish_reason"] == "length" for each in events)
        fresh = [await server.run(prompt=prompt, max_tokens=30) for prompt in PROMPTS]
        fresh.append(await server.run(messages=chat, max_tokens=30))
        assert [text_of(each) for each in events[2:]] == [text_of(each) for each in fresh]
        assert text_of(events[2]) == engine_text(root / "b.gguf", PROMPTS[0], max_tokens=30)
        assert text_of(events[0]) == engine_text(root / "a.gguf", "the", max_tokens=20)


async def test_a_waiting_task_that_the_new_model_cannot_run_ends_with_the_reason(root: Path) -> None:
    letters = tuple(piece for piece in PIECES if len(piece) == 1)  # so that a word is many tokens
    write_tiny_llama(root / "b.gguf", pieces=letters, chat_template=None)
    async with serving(root / "a.gguf", pool={"slots": 1, "ctx": 256}) as server:
        server.brake.hold()
        running = await server.submit(max_tokens=5)
        long = await server.submit(prompt="the people " * 50, max_tokens=100)
        chat = await server.submit(messages=[{"role": "user", "content": "hello"}], max_tokens=5)
        pinned = await server.submit(model_ref="a", max_tokens=5)
        fits = await server.submit(prompt="the people", max_tokens=5)
        await reloaded(server, "b")
        server.brake.release()
        error = failure(await server.events(long))
        assert error["code"] == "INVALID_PARAMS"
        assert "and max_tokens 100 do not fit into a slot's context of 256" in error["message"]
        assert "no chat template" in failure(await server.events(chat))["message"]
        error = failure(await server.events(pinned))
        assert error["code"] == "POOL_UNAVAILABLE"
        assert error["message"] == "the task asked for 'a', but its pool now serves 'b'"
        for task in (running, fits):
            assert (await server.events(task))[-1].data["tokens_out"] == 5
        assert await server.total("tasks_enqueued_total", replica_id="") == 3
        refusal = await server.post(prompt="x", model_ref="a")
        assert (refusal.status, refusal.json()["code"]) == (503, "POOL_UNAVAILABLE")
        assert "Retry-After" in refusal.headers


async def test_the_same_model_again_and_back_and_forth(root: Path, closed: list[str]) -> None:
    async with serving(root / "a.gguf") as server:
        assert await states(server) == {"a": "Active"}
        await reloaded(server)
        assert await states(server) == {"a": "Active"}
        await reloaded(server, "b")
        assert await states(server) == {"a": "Retired", "b": "Active"}
        await reloaded(server, "a")
        assert await states(server) == {"a": "Active", "b": "Retired"}
        await until(lambda: sorted(closed) == ["a.gguf", "a.gguf", "b.gguf"], "what was replaced is closed")
        assert text_of(await server.run(max_tokens=10)) == engine_text(root / "a.gguf", "the", max_tokens=10)


async def test_a_model_of_another_kind_and_shape(root: Path) -> None:
    swa = write_tiny_swa(root / "swa.gguf")
    async with serving(root / "a.gguf") as server:
        await reloaded(server, "swa")
        assert text_of(await server.run(max_tokens=30)) == engine_text(swa, "the", max_tokens=30)


async def test_a_second_reload_is_told_to_wait_and_one_whose_client_left_is_completed(root: Path) -> None:
    async with serving(root / "a.gguf") as server:
        server.brake.may_load.clear()
        async with aiohttp.ClientSession() as impatient:
            with pytest.raises(asyncio.TimeoutError):
                await impatient.post(
                    f"{server.url}/v1/pools/default/reload",
                    json={"new_model_ref": "b"},
                    headers={"Authorization": f"Bearer {TOKEN}"},
                    timeout=aiohttp.ClientTimeout(total=1.0),
                )
        refusal = await reload(server, "b")
        assert (refusal.status, refusal.json()["code"]) == (409, "RELOAD_IN_PROGRESS")
        assert await states(server) == {"a": "Active"}
        server.brake.release()

        async def done() -> bool:
            return await states(server) == {"a": "Retired", "b": "Active"}

        await until(done, "the reload is completed")
        await reloaded(server, "a")


async def test_there_is_nothing_to_reload_before_the_first_load(root: Path) -> None:
    brake = Brake()
    brake.may_load.clear()
    async with serving(root / "a.gguf", brake=brake, ready=False) as server:
        refusal = await reload(server, "b")
        assert (refusal.status, refusal.json()["code"]) == (503, "POOL_UNREADY")
        assert "Retry-After" in refusal.headers
        assert (await reload(server, pool="nope")).status == 404


async def test_a_server_does_not_start_on_a_damaged_model(root: Path) -> None:
    (root / "bad.gguf").write_bytes(damaged_gguf.duplicate_tokens((root / "a.gguf").read_bytes()))
    with pytest.raises(ConfigError, match=r"crashes llama\.cpp with SIGABRT"):
        async with serving(root / "bad.gguf"):
            pass


# --- references


async def test_references_that_lead_nowhere_are_400_and_leave_no_trace(root: Path, tmp_path: Path) -> None:
    secret = write_tiny_llama(tmp_path / "secret.gguf")
    (root / "link.gguf").symlink_to(secret)
    (root / "folder").mkdir()
    (root / "folder.gguf").mkdir()
    os.mkfifo(root / "fifo.gguf")
    references = ["../secret.gguf", "sub/../../secret", str(secret), "link", "folder", "folder.gguf", "fifo", "nope"]
    references += ["/dev/zero", "/etc/passwd", "", "x" * 5000, "a\0.gguf"]
    async with serving(root / "a.gguf") as server:
        for reference in references:
            answer = await reload(server, reference)
            assert answer.status == 400, reference
            body = answer.json()
            assert set(body) == {"code", "message", "engine"}
            assert str(root) not in body["message"]
        assert (await reload(server, "a", pool="other")).status == 404
        for reference in ("b.gguf", "./b", str(root / "b.gguf"), "b"):
            assert (await reload(server, reference)).status == 200, reference
        assert await states(server) == {"a": "Retired", "b": "Active"}


async def test_a_checksum_beside_a_model(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256((root / "b.gguf").read_bytes()).hexdigest()
    monkeypatch.setattr("orchd.pools.loading.DIGEST_LOG_S", 0.0)
    caplog.set_level(logging.INFO)
    async with serving(root / "a.gguf") as server:
        sidecar = root / "b.gguf.sha256"
        sidecar.write_text(f"{'0' * 64}  b.gguf\n")
        answer = await reload(server, "b")
        assert (answer.status, answer.json()["code"]) == (422, "RELOAD_FAILED")
        message = answer.json()["message"]
        assert message.startswith("vetting failed: b.gguf is damaged: its SHA-256 begins with")
        assert message.endswith("; a still serves")
        sidecar.write_text("not a checksum")
        assert "b.gguf.sha256 is not a checksum of b.gguf" in (await reload(server, "b")).json()["message"]
        assert await states(server) == {"a": "Active"}
        caplog.clear()
        sidecar.write_text(f"{digest}  b.gguf\n")
        await reloaded(server, "b")
        assert "100 % of b.gguf checked against its checksum" in caplog.text
        assert "not verified" not in caplog.text
        sidecar.unlink()
        await reloaded(server, "b")
        assert "b.gguf not verified" in caplog.text


async def test_a_split_model_loads_from_its_first_part(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_gguf, "GGUFWriter", functools.partial(GGUFWriter, split_max_tensors=12))
    write_tiny_llama(root / "split.gguf", seed=2, pieces=PIECES[::-1])
    assert sum(name.startswith("split-0000") for name in os.listdir(root)) == 2
    async with serving(root / "a.gguf") as server:
        await reloaded(server, "split")
        assert text_of(await server.run(max_tokens=20)) == engine_text(root / "b.gguf", "the", max_tokens=20)
        assert (await reload(server, "split-00001-of-00002.gguf")).status == 200
        assert (await reload(server, "split-00002-of-00002.gguf")).status == 400
        second = root / "split-00002-of-00002.gguf"
        second.write_bytes(second.read_bytes()[:-100])
        assert (await reload(server, "split")).status == 422
        second.unlink()
        assert (await reload(server, "split")).status == 400
        assert (await reload(server)).status == 422
        assert text_of(await server.run(max_tokens=20)) == engine_text(root / "b.gguf", "the", max_tokens=20)


# --- where the old model has to leave first


async def test_replacing_first_ends_what_runs_and_starts_what_waits_on_the_new_model(
    root: Path, closed: list[str]
) -> None:
    async with serving(root / "a.gguf", pool={"reload": "replace", "slots": 1}) as server:
        server.brake.hold()
        running = await server.submit(max_tokens=30)
        waiting = await server.submit(max_tokens=30)
        work = asyncio.create_task(reload(server, "b"))

        async def away() -> bool:
            health = await server.request("GET", "/health")
            return bool(health.status == 503 and health.json()["status"] == "loading")

        await until(away, "the old model leaves")
        late = await server.submit(max_tokens=30)
        server.brake.release()
        assert (await work).status == 200
        assert closed == ["a.gguf"]
        assert text_of(await server.events(running)) == engine_text(root / "a.gguf", "the", max_tokens=30)
        for task in (waiting, late):
            assert text_of(await server.events(task)) == engine_text(root / "b.gguf", "the", max_tokens=30)


async def test_a_task_that_outlasts_the_grace_ends_with_decode_timeout(root: Path) -> None:
    async with serving(root / "a.gguf", pool={"reload": "replace"}, server={"shutdown_grace_s": 0.05}) as server:
        server.brake.allow(3)
        task = await server.submit(max_tokens=50)
        await server.started(1)
        await reloaded(server, "b")
        end = (await server.events(task))[-1].data
        assert end["finish_reason"] == "error"
        assert end["error"]["code"] == "DECODE_TIMEOUT"
        server.brake.release()
        assert text_of(await server.run(max_tokens=10)) == engine_text(root / "b.gguf", "the", max_tokens=10)


async def test_if_the_new_model_fails_the_old_one_is_loaded_again(
    root: Path, monkeypatch: pytest.MonkeyPatch, closed: list[str]
) -> None:
    load = LlamaCppEngine.load

    def fails(self: LlamaCppEngine, spec: Any, device: Any, **more: Any) -> LlamaModel:
        if spec.path.name == "b.gguf":
            raise LoadFailed("b.gguf loads, but its first step fails: it was made to")
        return load(self, spec, device, **more)

    async with serving(root / "a.gguf", pool={"reload": "replace", "slots": 1}) as server:
        monkeypatch.setattr(LlamaCppEngine, "load", fails)
        server.brake.allow(5)
        running, waiting = [await server.submit(max_tokens=20) for _ in range(2)]
        work = asyncio.create_task(reload(server, "b"))
        server.brake.release()
        answer = await work
        assert answer.status == 422
        assert answer.json()["message"] == (
            "loading failed: b.gguf loads, but its first step fails: it was made to; a was loaded again and serves"
        )
        expected = engine_text(root / "a.gguf", "the", max_tokens=20)
        assert [text_of(await server.events(task)) for task in (running, waiting)] == [expected] * 2
        assert await states(server) == {"a": "Active"}
