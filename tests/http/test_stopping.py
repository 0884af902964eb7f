"""A server that stops while something hangs: every stream gets its end, and the process its own, in bounded time."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.api import Footprint, ModelSpec, WaitCallback
from engines.errors import LoadFailed
from orchd.models import loader as loaders
from orchd.models.loader import Loader
from testkit.fake_engine import FakeEngine, Hang
from testkit.observers import Quiet
from testkit.process import Process, follow, orchd_serve, submit
from testkit.stage import make_stage

ROOT = Path(__file__).parents[2]
BOUND_S = 15.0
"""For two seconds of grace and answers, and 5 s each for loads and workers, on a machine that does other things."""

HANGS = """
import ctypes, pathlib, sys
import time

if "{where}" == "vet" and "engines.llamacpp.examination" in sys.orig_argv:
    time.sleep(1000)
if "{where}" != "vet" and "serve" in sys.orig_argv:
    from engines.llamacpp.grammar import Grammars
    from engines.llamacpp.native.context import NativeContext
    from engines.llamacpp.native.model import NativeModel

    owner = {{"decode": NativeContext, "load": NativeModel, "schema": Grammars}}["{where}"]
    name = {{"decode": "decode", "load": "__init__", "schema": "compile"}}["{where}"]
    real = getattr(owner, name)

    def hangs(*args, **kwargs):
        while pathlib.Path("hang").exists():
            pathlib.Path("hangs").touch()
            ctypes.CDLL(None).pause()
        return real(*args, **kwargs)

    setattr(owner, name, hangs)
"""
"""A ``sitecustomize`` that lets llama.cpp hang in native code once there is a file ``hang``."""


@contextmanager
def hanging(where: str, *args: str, home: Path, **environ: str) -> Iterator[Process]:
    patch = home / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(HANGS.format(where=where))
    added: dict[str, Any] = {"PYTHONPATH": f"{patch}:{ROOT}", **environ}
    with orchd_serve(*args, "--port", "0", home=home, **added) as process:
        yield process


def stop(process: Process) -> float:
    """Send SIGTERM; how long the process took to end as it should."""
    began = time.monotonic()
    process.send(signal.SIGTERM)
    assert process.wait() == 0
    assert process.stderr.splitlines()[-1] == "stopped", process.stderr
    assert "Traceback" not in process.stderr
    return time.monotonic() - began


def test_a_step_that_never_ends_costs_no_stream_its_end_and_does_not_keep_the_process(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    with hanging(
        "decode", "-m", str(tiny_model_path), "--ctx", "60000", home=tmp_path, ORCHD_SHUTDOWN_GRACE_S="0.2"
    ) as process:
        port = process.wait_ready()
        stream = follow(port, submit(port, prompt="the", max_tokens=59_000, ignore_eos=True))
        assert [next(stream)[0] for _ in range(3)] == ["started", "token", "token"]
        (tmp_path / "hang").touch()
        process.until((tmp_path / "hangs").exists, "the step hangs")
        ends: list[tuple[str, object]] = []
        listener = threading.Thread(
            target=lambda: ends.extend((k, d["finish_reason"]) for k, d in stream if k == "end")
        )
        listener.start()
        assert stop(process) < BOUND_S
        listener.join(5)
    assert ends == [("end", "cancelled")]
    assert "hangs in a step and is abandoned" in process.stderr


def unanswered(port: int) -> None:
    with contextlib.suppress(Exception):  # the server stops
        submit(port, prompt="the", json_schema=True)


def test_a_schema_whose_compilation_hangs_does_not_keep_the_process(tiny_model_path: Path, tmp_path: Path) -> None:
    with hanging("schema", "-m", str(tiny_model_path), home=tmp_path, ORCHD_SHUTDOWN_GRACE_S="0.2") as process:
        port = process.wait_ready()
        (tmp_path / "hang").touch()
        thread = threading.Thread(target=unanswered, args=(port,))
        thread.start()
        process.until((tmp_path / "hangs").exists, "the schema's compilation hangs")
        assert stop(process) < BOUND_S
        thread.join(5)


@pytest.mark.parametrize("where", ["load", "vet"])
def test_a_load_that_hangs_does_not_keep_the_process(tiny_model_path: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "hang").touch()
    with hanging(where, "-m", str(tiny_model_path), home=tmp_path) as process:
        if where == "load":
            process.until((tmp_path / "hangs").exists, "the load hangs")
        else:
            process.until(lambda: vetting(process), "the file is being vetted")
        assert stop(process) < BOUND_S
        assert not vetting(process)


def vetting(process: Process) -> list[int]:
    """The processes in which the server opens files."""
    children = Path(f"/proc/{process.popen.pid}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    return [pid for pid in pids if b"engines.llamacpp.examination" in Path(f"/proc/{pid}/cmdline").read_bytes()]


async def test_what_a_worker_does_not_answer_is_ended_from_the_loop(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, slots=2) as stage:
        hang = Hang()
        stage.model().step_faults.append(hang)
        tasks = [await stage.submit(max_tokens=5)]
        await stage.until(hang.began.is_set)
        tasks += [await stage.submit(), await stage.submit()]  # one of them has a slot and is not begun
        await stage.service.shut_down(0)
        assert all(task.log.ended for task in tasks)
        hang.release.set()  # what the worker says now counts for nothing
        assert await stage.ends_of(tasks) == {"cancelled": 3}
        await stage.until(lambda: not any(slots.running for slots in stage.pool.scheduler.replicas))


async def test_a_server_that_stops_is_not_ready(tiny_model_path: Path) -> None:
    async with make_stage(tiny_model_path, pools=("default", "other")) as stage:
        assert stage.service.health().status == "ok"
        await stage.service.shut_down(0)
        health = stage.service.health()
        assert (health.status, [pool.ready for pool in health.pools]) == ("degraded", [False, False])


def test_closing_ends_a_vetting_that_waits(tmp_path: Path) -> None:
    waits = threading.Event()

    class Waiting(FakeEngine):
        def vet(self, spec: ModelSpec, *, on_wait: WaitCallback | None = None) -> Footprint:
            assert on_wait is not None
            while True:
                waits.set()
                on_wait()
                time.sleep(0.001)

    loader = Loader(Waiting(), Quiet())
    vetting = loader._submit(lambda: loader._engine.vet(ModelSpec(tmp_path), on_wait=loader.check_open))
    assert waits.wait(5)
    assert loader.close()
    with pytest.raises(LoadFailed, match="shutting down"):
        vetting.result()


def test_a_load_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "CLOSE_S", 0.05)
    loader, go_on = Loader(FakeEngine(), Quiet()), threading.Event()
    loader._submit(go_on.wait)
    loader._submit(time.monotonic)  # what waits behind it is not begun
    assert not loader.close()
    go_on.set()
    assert loader.close()
