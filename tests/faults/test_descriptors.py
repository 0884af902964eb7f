"""A server that has no more file descriptors goes on with what it has, says so once, and recovers by itself."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import time
from pathlib import Path

from testkit.process import TOKEN, call, follow, orchd_serve, submit

HEALTH = f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()


def test_out_of_descriptors(tiny_model_path: Path, tmp_path: Path) -> None:
    """Without the mend, Python's event loop logs some thousand tracebacks a second here, and more every second."""
    with orchd_serve("--model", str(tiny_model_path), "--port", "0", home=tmp_path) as process:
        port = process.wait_ready()
        stream = follow(port, submit(port, prompt="the", max_tokens=3000, ignore_eos=True))
        assert next(stream)[0] == "started"
        with socket.create_connection(("127.0.0.1", port)) as patient, contextlib.ExitStack() as crowd:
            there = len(os.listdir(f"/proc/{process.popen.pid}/fd"))
            resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (there + 10, there + 10))
            for _ in range(50):
                crowd.enter_context(socket.create_connection(("127.0.0.1", port)))
            time.sleep(2.5)
            began = time.monotonic()
            patient.sendall(HEALTH)
            assert patient.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            assert time.monotonic() - began < 1
            reload = b"POST /v1/pools/default/reload HTTP/1.1\r\nContent-Length: 0" + HEALTH[HEALTH.index(b"\r\n") :]
            patient.sendall(reload)
            head, _, body = patient.recv(1 << 16).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 422 ")
            assert json.loads(body)["code"] == "RELOAD_FAILED"
        *_, (kind, end) = stream
        assert (kind, end["finish_reason"]) == ("end", "length")
        deadline = time.monotonic() + 5
        while True:  # the descriptors are free again, and the next try comes within a second
            with contextlib.suppress(OSError):
                assert call(port, "GET", "/health")[0] == 200
                break
            assert time.monotonic() < deadline
    told = [line for line in process.stderr.splitlines() if "Too many open files" in line and "ERROR" in line]
    assert len(told) == 1, f"{len(process.stderr)} bytes of log"
    assert "ulimit -n" in told[0]
    assert "Traceback" not in process.stderr


def test_the_soft_limit_is_raised_to_what_is_allowed(tiny_model_path: Path, tmp_path: Path) -> None:
    """1,024 is the default of most machines, and every client and every listener takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with orchd_serve("--model", str(tiny_model_path), "--port", "0", home=tmp_path) as process:
            process.wait_ready()
            assert resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE) == (min(hard, 65536), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
