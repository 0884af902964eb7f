"""Clients that hang up in the middle of something leave nothing behind, in the log neither."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import threading
from pathlib import Path

import pytest

from orchd.models import files
from testkit.harness import TOKEN, serving, until


async def test_a_reload_whose_client_left_fails_without_a_traceback(
    tiny_model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the soak: "Task exception was never retrieved", twice, for a failure that was told and logged."""
    (tmp_path / "notes.gguf").write_text("no model")
    caplog.set_level(logging.WARNING)
    may_look, looks = threading.Event(), threading.Event()
    look = files.looks_like_gguf

    def slowly(path: Path) -> None:
        looks.set()
        assert may_look.wait(20)
        look(path)

    async with serving(tiny_model_path, models={"roots": [str(tmp_path)]}) as server:
        monkeypatch.setattr("orchd.models.files.looks_like_gguf", slowly)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            body = b'{"new_model_ref":"notes"}'
            head = f"POST /v1/pools/default/reload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await until(looks.is_set, "it is under way")
        await asyncio.sleep(0.05)  # the server notices that the client left
        may_look.set()
        await until(lambda: "the reload failed" in caplog.text, "it is done")
        await asyncio.sleep(0.05)
        gc.collect()
        assert (await server.run(max_tokens=2))[-1].data["finish_reason"] == "length"
    assert "never retrieved" not in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
