"""What becomes of a server whose model file is deleted, replaced, cut or written over while it serves."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from testkit.harness import serving, text_of
from testkit.process import follow, orchd_serve, submit
from testkit.tiny_gguf import write_tiny_llama

TASK = {"prompt": "the river and", "max_tokens": 40, "ignore_eos": True}


def delete(model: Path) -> None:
    model.unlink()


def replace(model: Path) -> None:
    os.replace(write_tiny_llama(model.with_name("other"), seed=7), model)


def cut(model: Path) -> None:
    os.truncate(model, 1000)


def write_over(model: Path) -> None:
    model.write_bytes(write_tiny_llama(model.with_name("other"), seed=7).read_bytes())


@pytest.mark.parametrize(
    ("mmap", "change", "reload_status"),
    [
        (True, delete, 422),
        (True, replace, 200),
        (False, delete, 422),
        (False, replace, 200),
        (False, cut, 422),
        (False, write_over, 200),
    ],
)
async def test_what_is_loaded_serves_on_and_a_reload_sees_the_file_as_it_is(
    tmp_path: Path, mmap: bool, change: Callable[[Path], None], reload_status: int
) -> None:
    model = write_tiny_llama(tmp_path / "model.gguf")
    async with serving(model, pool={"mmap": mmap}) as server:
        before = text_of(await server.run(**TASK))
        change(model)
        assert text_of(await server.run(**TASK)) == before
        answer = await server.request("POST", "/v1/pools/default/reload")
        assert answer.status == reload_status, answer.body
        after = text_of(await server.run(**TASK))
        assert (after == before) == (reload_status == 422)


def test_a_mapped_file_that_is_cut_ends_the_process_and_the_log_says_why(tmp_path: Path) -> None:
    """Nothing in a process can prevent it: the kernel takes the pages away. ``mmap = false`` does, see above."""
    model = write_tiny_llama(tmp_path / "model.gguf")
    (tmp_path / "orchd.toml").write_text("[[pools]]\nmodel = 'model.gguf'\nctx = 512\nthreads = 1\n")
    with orchd_serve("--port", "0", home=tmp_path) as process:
        port = process.wait_ready()
        assert [kind for kind, _ in follow(port, submit(port, **TASK))][-1] == "end"
        cut(model)
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            while process.popen.poll() is None:
                list(follow(port, submit(port, **TASK)))
        code = process.wait()
        assert code == -signal.SIGBUS, process.stderr
    assert "Bus error" in process.stderr
    assert "engines/llamacpp/native/context.py" in process.stderr
