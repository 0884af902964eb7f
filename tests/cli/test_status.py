"""`orchd status`: from `/health` and `/metrics` alone, once in a pipe, again and again on a terminal."""

from __future__ import annotations

import json
import re
import sys

import pytest

from orchd.cli.commands.status import screen
from orchd.cli.console import console_for
from orchd.cli.status import Look, Samples, status_of
from orchd.client import Health
from orchd.schemas import PoolHealth, ReplicaHealth
from testkit import stand_in as s
from testkit.stand_in import StandIn
from tests.cli.shell import on_terminal, orchd

LABELS = 'engine="llamacpp",engine_version="0.3.36",pool_id="default"'


def metrics(tokens: int, waiting: int = 3) -> str:
    return "\n".join(
        [
            "# HELP queue_depth Tasks waiting in the pool's queue.",
            f'queue_depth{{{LABELS},priority="interactive"}} {waiting}.0',
            f'queue_depth{{{LABELS},priority="batch"}} 12.0',
            'tasks_rejected_total{engine="llamacpp",reason="ADMISSION_REJECT"} 5.0',
            f'tokens_out_total{{{LABELS},replica_id="0"}} {tokens}.0',
            f'gpu_utilization{{{LABELS},replica_id="0",device="gpu:0"}} 0.5',
            f'vram_used_bytes{{{LABELS},replica_id="0",device="gpu:0"}} 2147483648.0',
        ]
    )


def serve(server: StandIn, *tokens: int) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    server.on("GET /metrics", *(s.raw(metrics(count).encode(), content_type="text/plain") for count in tokens))


def test_status_as_json(server: StandIn) -> None:
    serve(server, 100, 150)
    answer = json.loads(orchd("status", "--json", "--url", server.url).stdout)
    assert (answer["url"], answer["status"], answer["engine_version"]) == (server.url, "ok", "0.3.36")
    [pool] = answer["pools"]
    assert pool["waiting"] == {"interactive": 3, "batch": 12}
    [replica] = pool["replicas"]
    assert 20 < replica["tokens_per_s"] <= 50
    assert (replica["busy"], replica["slots"], replica["gpu_utilization"]) == (1, 4, 0.5)
    assert answer["rejected"] == 5


def test_a_pipe_gets_it_once_without_colour(server: StandIn) -> None:
    serve(server, 100, 100)
    result = orchd("status", "--url", server.url)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    words = result.stdout.split()
    for word in ("ok", server.url, "tiny-llama", "1/4", "0.0", "50%", "2.0", "12"):
        assert word in words, result.stdout


def test_a_terminal_is_refreshed_until_ctrl_c(server: StandIn) -> None:
    serve(server, 100, 100)
    server.on("GET /metrics", s.raw(metrics(100, waiting=777).encode(), content_type="text/plain"))
    shown, code = on_terminal("status", "--url", server.url, interrupt_at="777")
    assert code == 0
    assert shown.endswith("\x1b[?25h")  # the cursor is there again


def test_a_server_that_leaves_is_told_and_waited_for(server: StandIn) -> None:
    health = s.answer(s.health_body())
    server.on("GET /health", health, health, s.raw(b"", status=502), health)
    server.on("GET /metrics", s.raw(metrics(1).encode(), content_type="text/plain"))
    keys = [("answers 502", ""), ("tiny-llama", "\x03")]
    assert on_terminal("status", "--url", server.url, typed=keys)[1] == 0


@pytest.mark.parametrize("term", ["dumb"])
def test_a_dumb_terminal_gets_it_once(server: StandIn, term: str) -> None:
    serve(server, 1, 1)
    shown, code = on_terminal("status", "--url", server.url, term=term)
    assert code == 0
    assert shown.count("tiny-llama") == 1


def test_a_narrow_terminal_has_one_line_for_each_replica(capsys: pytest.CaptureFixture[str]) -> None:
    replicas = tuple(ReplicaHealth(id=str(n), device=f"gpu:{n}", alive=n != 1, slots=4, busy=n) for n in range(3))
    pool = PoolHealth(id="default", model_id="a-model-with-quite-a-name", ctx=64, ready=True, replicas=replicas)
    health = Health(status="degraded", pools=(pool,))
    look = Look(0.0, health, metrics(1))

    out = console_for(sys.stdout)
    out.width = 60
    out.print(screen(status_of("http://127.0.0.1:8737", look, look)))
    rows = [line for line in capsys.readouterr().out.splitlines() if re.search(r"gpu:\d|g…", line)]
    assert len(rows) == 3
    assert all(len(row) <= 60 for row in rows)


def test_a_counter_that_began_anew_is_no_negative_speed() -> None:
    pool = PoolHealth(id="default", model_id=None, ctx=64, ready=False, replicas=())
    health = Health(status="ok", pools=(pool,))
    assert status_of("u", Look(0, health, metrics(9)), Look(1, health, metrics(1))).pools[0].model_id is None
    assert Samples('a{x="1",y="q\\"}"} 2\n').total("a", x="1") == 2
