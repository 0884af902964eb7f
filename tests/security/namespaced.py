"""Run inside a network namespace that has loopback only: a server's whole day, and what it tried to reach besides.

Prints JSON: packets that found no route during that day, and after one deliberate attempt.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
from pathlib import Path

from testkit.process import call, orchd_serve


def attempts() -> int:
    """Packets of this namespace that had no route: whatever wanted to leave it, name look-ups too."""
    names, values = (line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Ip:"))
    return int(values[names.index("OutNoRoutes")])


def main() -> None:
    home, model = Path(sys.argv[1]), sys.argv[2]
    before = attempts()
    with orchd_serve("--model", model, "--port", "0", home=home, token=None) as process:
        port = process.wait_ready()
        (token,) = (path.read_text().strip() for path in home.glob("**/orchd/token"))
        for path in ("/health", "/metrics"):
            assert call(port, "GET", path, token=token)[0] == 200
        assert call(port, "POST", "/v1/pools/default/reload", token=token)[0] == 200
        status, response = call(
            port, "POST", "/v1/tasks", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}, token=token
        )
        assert status == 202
        task_id = json.loads(response.read())["task_id"]
        _, stream = call(port, "GET", f"/v1/tasks/{task_id}/stream", token=token)
        assert b"event: end" in stream.read()
        process.send(signal.SIGTERM)
        assert process.wait() == 0
    of_the_server = attempts() - before
    with contextlib.suppress(OSError):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    print(json.dumps({"server": of_the_server, "deliberate": attempts() - before - of_the_server}))


if __name__ == "__main__":
    main()
