"""What one submit may cost everyone else: bodies of every shape, and how long /health takes beside them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orchd.http import routes
from orchd.http.routes import LONG_FIELDS
from orchd.schemas import MAX_ARGUMENTS, TaskRequest
from testkit.harness import serving
from testkit.large_bodies import SHAPES, SIZE
from testkit.process import TOKEN, Process, call, orchd_serve, submit

LIMIT_S = 0.25
"""Most that /health may take beside a body. What this is about took from 0.7 to 200 s."""

TRIES = 4
"""Other programs hold up a machine too, but hardly the same shape so many times."""


@pytest.fixture(scope="module")
def server(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, int]]:
    home = tmp_path_factory.mktemp("large")
    with orchd_serve("-m", str(tiny_model_path), "--port", "0", home=home) as process:
        port = process.wait_ready()
        submit(port, messages=[{"role": "user", "content": "the"}], max_tokens=1)  # the template is compiled now
        yield process, port


def _send(port: int, body: bytes, *, head: str = "") -> int:
    """Post a body; the status of its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        length = "" if "chunked" in head else f"Content-Length: {len(body)}\r\n"
        start = f"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n{length}{head}\r\n"
        with contextlib.suppress(ConnectionError):  # an answer that comes before all of the body
            connection.sendall(start.encode() + body)
        with connection.makefile("rb") as answer:
            return int(answer.readline().split()[1])


def _while_sending(port: int, bodies: list[bytes], ask: Callable[[], object], *, head: str = "") -> list[int]:
    """Ask again and again while the bodies are sent at once and answered; the statuses of these answers."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = [threads.submit(_send, port, body, head=head) for body in bodies]
        while not all(answer.done() for answer in answers):
            ask()
        return [answer.result() for answer in answers]


def _assert_nobody_waits(port: int, bodies: list[bytes], *, head: str = "") -> list[int]:
    """The statuses of the bodies, which hold up nobody."""
    longest_s: list[float] = []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask() -> None:
        begun = time.perf_counter()
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {TOKEN}"})
        connection.getresponse().read()
        longest_s[-1] = max(longest_s[-1], time.perf_counter() - begun)
        time.sleep(0.001)

    for _ in range(TRIES):
        longest_s.append(0.0)
        statuses = _while_sending(port, bodies, ask, head=head)
        if longest_s[-1] < LIMIT_S:
            return statuses
    pytest.fail(f"/health took {', '.join(f'{s:.2f}' for s in longest_s)} s; at most {LIMIT_S} are expected")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_body_of_the_allowed_size_holds_up_nobody(server: tuple[Process, int], shape: str) -> None:
    assert len(SHAPES[shape]) <= SIZE
    statuses = _assert_nobody_waits(server[1], [SHAPES[shape]])
    assert set(statuses) <= {202, 400}


def test_a_compressed_body_costs_nothing(server: tuple[Process, int]) -> None:
    bomb = gzip.compress(bytes(200 << 20), compresslevel=1)
    assert SIZE // 2 < len(bomb) < SIZE
    assert _assert_nobody_waits(server[1], [bomb], head="Content-Encoding: gzip\r\n") == [400]


def test_a_body_in_chunks_of_one_byte_holds_up_nobody(server: tuple[Process, int]) -> None:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in SHAPES["words"]) + b"0\r\n\r\n"
    assert _assert_nobody_waits(server[1], [chunks], head="Transfer-Encoding: chunked\r\n") == [400]


def test_many_of_the_worst_at_once_do_not_hold_up_other_prompts(server: tuple[Process, int]) -> None:
    port = server[1]
    took_s = []

    def ask() -> None:
        begun = time.perf_counter()
        status, response = call(port, "POST", "/v1/tasks", {"prompt": "the river " * 100, "max_tokens": 1})
        assert (status, len(response.read())) > (0, 0)
        took_s.append(time.perf_counter() - begun)

    worst = [SHAPES["empty messages"], SHAPES["control tokens and blanks"]] * 4
    assert set(_while_sending(port, worst, ask)) == {400}
    assert sorted(took_s)[len(took_s) // 2] < LIMIT_S
    assert set(_assert_nobody_waits(port, worst)) == {400}


@pytest.mark.parametrize("field", sorted(set(TaskRequest.__struct_fields__) - LONG_FIELDS))
def test_a_value_that_is_far_too_long_is_explained_as_any_wrong_one(server: tuple[Process, int], field: str) -> None:
    def answer(value: object) -> tuple[int, object]:
        status, response = call(server[1], "POST", "/v1/tasks", {"prompt": "the", field: value})
        return status, json.loads(response.read())

    expected = answer({})
    assert expected[0] == 400
    assert answer(["x"] * 40_000) == expected
    assert answer("x" * 100_000) == expected


LETTERS = rb"\u0061" * 12_000
ARGUMENTS = b",".join(b'"a%d":"%b"' % (number, LETTERS[: 6 * 256]) for number in range(MAX_ARGUMENTS))


@pytest.mark.parametrize(
    "body",
    [
        b'{"max_tokens":1,"prompt":"the","json_schema":{"type":"boolean","description":"' + LETTERS + b'"}}',
        b'{"max_tokens":1,"messages":[{"role":"user","content":"the"}],"chat_template_kwargs":{' + ARGUMENTS + b"}}",
    ],
    ids=["json_schema", "chat_template_kwargs"],
)
def test_fields_that_may_be_long_are_read(server: tuple[Process, int], body: bytes) -> None:
    assert _send(server[1], body) == 202


async def test_the_event_loop_goes_round_between_two_large_bodies(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, decode = asyncio.get_running_loop(), routes._decode
    rounds, seen = 0, []

    def count() -> None:
        nonlocal rounds
        rounds += 1
        loop.call_soon(count)

    def decoded(*given: Any) -> Any:
        seen.append(rounds)
        return decode(*given)

    monkeypatch.setattr(routes, "_decode", decoded)
    async with serving(tiny_model_path) as running:
        large = b'{"prompt":1,"max_tokens":1' + b" " * routes.LARGE_BODY_BYTES + b"}"
        count()
        answers = await asyncio.gather(*(running.post(large) for _ in range(20)))
    assert [answer.status for answer in answers] == [400] * 20
    assert len(set(seen)) == len(seen) == 20
