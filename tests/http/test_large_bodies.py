"""What one submit may cost everyone else: bodies of every shape, and how long /health takes beside them."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testkit.process import TOKEN, Process, call, orchd_serve, submit

SIZE = 1 << 20
LIMIT_S = 0.25
"""Most that /health may take beside a body. What this is about took from 0.7 to 200 s."""

TRIES = 4
"""Other programs hold up a machine too, but hardly the same shape so many times."""


def _fill(head: bytes, unit: bytes, tail: bytes, between: bytes = b",") -> bytes:
    """As many units as fit."""
    count = (SIZE - len(head) - len(tail) + len(between)) // (len(unit) + len(between))
    return head + between.join([unit] * count) + tail


_HALFWAY = b"2.22507385850720113605740979670913197593481954635164564802342610972482222202107694551654e-308"
_EMPTY = b'{"role":"user","content":""}'
SHAPES: dict[str, bytes] = {
    "empty messages": _fill(b'{"messages":[', _EMPTY, b"]}"),
    "5,000 empty messages": b'{"messages":[' + b",".join([_EMPTY] * 5000) + b"]}",
    "messages of control tokens": _fill(b'{"messages":[', b'{"role":"user","content":"<s><s><s>"}', b"]}"),
    "words": _fill(b'{"prompt":"', b"the river", b'"}', b" "),
    "one word": _fill(b'{"prompt":"', b"a", b'"}', b""),
    "control tokens": _fill(b'{"prompt":"', b"<s>", b'"}', b""),
    "control tokens and blanks": _fill(b'{"prompt":"', b"<|im_end|>", b'"}', b" "),
    # No larger: llama.cpp takes time with the square of the bytes that have no token but their own, here 90 s for all.
    "almost control tokens": b'{"prompt":"' + b"<|" * 40_000 + b'"}',
    "escapes": _fill(b'{"prompt":"', rb"\ud83d\ude42", b'"}', b""),
    "blanks": b" " * (SIZE - 14) + b'{"prompt":"a"}',
    "stop strings": _fill(b'{"prompt":"a","stop":[', b'"x"', b"]}"),
    "deep": b'{"prompt":"a","x":' + b"[" * (SIZE - 20),
    "a number of a million digits": _fill(b'{"prompt":"a","max_tokens":', b"9", b"}", b""),
    "numbers that are hard to round": _fill(b'{"prompt":"a",', b'"min_p":' + _HALFWAY, b"}"),
    "the same field again": _fill(b'{"prompt":"a",', b'"seed":1', b"}"),
    "an unknown field's name": _fill(b'{"prompt":"a","', b"prompts", b'":1}', b""),
    "a priority": _fill(b'{"prompt":"a","priority":"', b"`", b'"}', b""),
    "a path": _fill(b'{"prompt":"a","model_ref":"', b"a", b'"}', b"/"),
    "a task id": _fill(b'{"prompt":"a","task_id":"', b"0", b'"}', b""),
    "not JSON": b"a" * SIZE,
}


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
