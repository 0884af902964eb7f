"""Time that stands still, and clocks that jump."""

from __future__ import annotations

import ast
import asyncio
import time
from pathlib import Path

import pytest

from orchd.settings.config import TasksConfig
from testkit.harness import serving

ROOT = Path(__file__).parents[2]
WALL_CLOCKS = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime"}
WALL_CLOCKS |= {f"{module}{kind}.{call}" for module in ("", "datetime.") for kind in ("datetime", "date")
                for call in ("now", "utcnow", "today")}  # fmt: skip
MAY = {
    "engines/llamacpp/template_globals.py": "datetime.datetime.now",  # a chat template writes today's date
    "orchd/models/vetted.py": "time.time",  # compared with files' times
    "orchd/openai/routes.py": "time.time",  # OpenAI's answers tell when they were made
}


def test_no_wait_and_no_age_depends_on_the_wall_clock() -> None:
    """So a clock that is set, or jumps, ends nothing early and holds nothing up."""
    found = {}
    for path in [*ROOT.glob("orchd/**/*.py"), *ROOT.glob("engines/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCKS:
                found[path.relative_to(ROOT).as_posix()] = ast.unparse(node)
            assert not (isinstance(node, ast.ImportFrom) and node.module == "time"), f"{path}: import time itself"
    assert found == MAY


async def test_a_clock_that_jumps_changes_nothing(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tiny_model_path, tasks={"retention_s": 60, "cancel_grace_s": 60}) as server:
        task_id = await server.submit(max_tokens=4)
        await server.events(task_id)
        now = time.time
        for jump_s in (86_400.0, -86_400.0):
            monkeypatch.setattr(time, "time", lambda jump_s=jump_s: now() + jump_s)
            await asyncio.sleep(0.6)  # housekeeping has looked twice
            assert (await server.events(task_id))[-1].kind == "end"
            assert (await server.run(max_tokens=4))[-1].data["finish_reason"] == "length"
            assert (await server.request("GET", "/health")).json()["status"] == "ok"


async def test_an_event_loop_that_is_blocked_for_a_second_loses_nothing(tiny_model_path: Path) -> None:
    """Workers go on meanwhile; afterwards everything is delivered, and nobody counts as gone or as hanging."""
    async with serving(tiny_model_path, tasks={"cancel_grace_s": 0.5}, workers={"stall_s": 0.5}) as server:
        server.brake.allow(2)
        async with server.listen(await server.submit(max_tokens=200)) as listener:
            assert (await anext(listener)).kind == "started"
            server.brake.release()
            time.sleep(1)  # noqa: ASYNC251 - this blocks, on purpose
            events = [event async for event in listener]
        assert [event.id for event in events] == list(range(1, 1 + len(events)))
        assert events[-1].data["finish_reason"] == "length"
        assert events[-1].data["tokens_out"] == 200
        assert (await server.request("GET", "/health")).json()["status"] == "ok"


def test_the_defaults_are_seconds_of_that_clock() -> None:
    assert (TasksConfig().retention_s, TasksConfig().cancel_grace_s) == (300, 5)
