"""Files that are no models, asked for by reload while eight streams run."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from engines.llamacpp.engine import LlamaCppEngine
from engines.llamacpp.vocab import LlamaVocab
from testkit import damaged_gguf
from testkit.harness import Event, Running, engine_text, serving, text_of
from testkit.tiny_gguf import PIECES, write_tiny_bert, write_tiny_llama

POOL: dict[str, Any] = {"devices": ["cpu", "cpu"], "slots": 4, "ctx": 512}
STREAMS = 8
TOKENS = 400
LIMIT_S = 15.0
"""For one answer; a bad file takes some 0.3 s of one core."""


def sample(good: bytes, *, seed: int) -> list[damaged_gguf.Damaged]:
    """Of every kind of damage some: each costs a process. `test_vet` goes through all 280."""
    kinds: dict[str, list[damaged_gguf.Damaged]] = {}
    for name, data in damaged_gguf.corpus(good):
        kinds.setdefault(name.partition("-")[0], []).append((name, data))
    chance = random.Random(seed)
    most = {"truncated": 4, "flipped": 10}
    chosen = [chance.sample(files, min(len(files), most.get(kind, 1))) for kind, files in sorted(kinds.items())]
    return [damaged for files in chosen for damaged in files]


def prompts() -> list[str]:
    return [f"{word} the people said" for word in ("one", "two", "three", "small", "old", "good", "great", "little")]


@pytest.mark.slow
async def test_no_file_whatever_is_in_it_disturbs_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "models"
    root.mkdir()
    a = write_tiny_llama(root / "a.gguf", seed=1)
    b = write_tiny_llama(root / "b.gguf", seed=2, pieces=PIECES[::-1])
    write_tiny_bert(root / "embedding.gguf")
    good = a.read_bytes()
    (root / "no-byte.gguf").write_bytes(good.replace(b"<0xE6>", b"<0xG6>"))
    (root / "folder.gguf").mkdir()
    os.mkfifo(root / "fifo.gguf")
    (root / "secret.gguf").write_bytes(good)
    (root / "secret.gguf").chmod(0)
    bad = {"embedding": 422, "no-byte": 422, "folder.gguf": 400, "fifo": 400, "secret": 400}
    for name, data in sample(good, seed=7):
        (root / f"{name}.gguf").write_bytes(data)
        bad[name] = 422
    if os.geteuid() == 0:
        bad["secret"] = 200  # root reads everything

    async with (
        serving(a, pool=POOL, workers={"stall_s": 600}) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as patient,
    ):
        server = dataclasses.replace(server, session=patient)  # its streams take longer than the harness allows
        streams = await start_all(server)
        await server.started(STREAMS)
        server.brake.release()
        undisturbed = [text_of(await stream) for stream in streams]

        streams = await start_all(server)
        await server.started(2 * STREAMS)
        loaded = 0
        for name, status in bad.items():
            server.brake.allow(8)  # the streams move while it is looked at
            answer = await asyncio.wait_for(reload(server, name), LIMIT_S)
            if answer[0] == 200 and name.startswith(("flipped", "secret")):
                loaded += 1  # a genuine load
                continue
            assert answer[0] == status, f"{name}: {answer}"
            assert str(root) not in answer[1]
        assert loaded < len(bad) / 2

        replaced = await reload_while_replaced(server, root, monkeypatch)
        assert replaced[0] == 422
        assert "changed" in replaced[1]

        assert not any(stream.done() for stream in streams), "they ran all the while"
        assert (await reload(server, "b"))[0] == 200
        server.brake.release()
        assert [text_of(await stream) for stream in streams] == undisturbed
        assert text_of(await server.run(max_tokens=20)) == engine_text(b, "the", max_tokens=20)
        health = (await server.request("GET", "/health")).json()
        assert health["status"] == "ok"
        assert health["pools"][0]["model_id"] == "b"


async def start_all(server: Running) -> list[asyncio.Task[list[Event]]]:
    """Streams that begin with the same step, once the brake allows one: its number of rows decides how sums round."""
    server.brake.hold()
    tasks = [await server.submit(prompt=prompt, max_tokens=TOKENS) for prompt in prompts()]
    return [asyncio.create_task(server.events(task)) for task in tasks]


async def reload(server: Running, name: str) -> tuple[int, str]:
    answer = await server.request("POST", "/v1/pools/default/reload", new_model_ref=name)
    body = answer.json()
    assert set(body) == ({"pool_id", "model_id"} if answer.status == 200 else {"code", "message", "engine"})
    return answer.status, body.get("message", "")


async def reload_while_replaced(server: Running, root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """A good file is vetted; before it is loaded, one that aborts llama.cpp takes its place."""
    victim = write_tiny_llama(root / "victim.gguf")
    deadly = root / "deadly"
    deadly.write_bytes(damaged_gguf.duplicate_tokens(victim.read_bytes()))

    def load_vocab(self: LlamaCppEngine, path: Path) -> LlamaVocab:
        vocab = LlamaVocab(path)
        if path == victim:
            deadly.replace(victim)
        return vocab

    with monkeypatch.context() as patch:
        patch.setattr(LlamaCppEngine, "load_vocab", load_vocab)
        return await reload(server, "victim")
