"""A real Prometheus with our `prometheus.yml` and a real server: it gets in, likes what it reads, answers the docs."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from testkit.account import EXAMPLES, ROOT, ServerProcess

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no Prometheus; sudo apt install prometheus",
)

Samples = list[tuple[dict[str, str], float]]


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self._url}{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> Samples:
        result = self.get("query", query=expression)["result"]
        return sorted(((sample["metric"], float(sample["value"][1])) for sample in result), key=str)

    def until(self, expression: str, holds: Callable[[Samples], bool]) -> Samples:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):  # it is still starting
                if holds(samples := self.query(expression)):
                    return samples
            assert time.monotonic() < deadline, f"{expression} is not as expected after 30 s"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With our file as it is, but for the port and the pace."""
    folder = tmp_path_factory.mktemp("prometheus")
    ours = (EXAMPLES / "monitoring/prometheus.yml").read_text()
    settings = ours.replace("127.0.0.1:8737", f"127.0.0.1:{server.port}").replace("interval: 5s", "interval: 250ms")
    (folder / "prometheus.yml").write_text(settings)
    (folder / "orchd.token").write_text(server.token + "\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield Prometheus(port)
        finally:
            process.terminate()


def test_promtool_has_nothing_to_say_about_our_metrics(server: ServerProcess) -> None:
    status, text = server.get("/metrics")
    assert status == 200
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_prometheus_gets_in_with_the_token(server: ServerProcess, prometheus: Prometheus) -> None:
    prometheus.until("up", lambda samples: [value for _, value in samples] == [1.0])
    [target] = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def documented_queries() -> list[str]:
    text = (ROOT / "docs/operations.md").read_text()
    block = re.search(r"```promql\n(.*?)```", text, re.S)
    assert block is not None
    return [line for line in block[1].splitlines() if line and not line.startswith("#")]


def one(check: Callable[[float], bool], **labels: str) -> Callable[[Samples], bool]:
    """There is one sample, with these labels, and its value is right."""
    return lambda samples: len(samples) == 1 and samples[0][0] == labels and check(samples[0][1])


EXPECTED: dict[str, Callable[[Samples], bool]] = {
    "sum by (pool_id, priority) (queue_depth)": lambda samples: (
        [(labels, value) for labels, value in samples]
        == [({"pool_id": "default", "priority": kind}, 0.0) for kind in ("batch", "interactive")]
    ),
    "sum by (pool_id) (rate(tokens_out_total[1m]))": one(lambda rate: rate > 0, pool_id="default"),
    "sum(rate(tokens_out_total[5m])) / sum(rate(tasks_enqueued_total[5m]))": one(lambda mean: abs(mean - 8) < 0.01),
    'sum by (priority) (increase(tasks_enqueued_total{replica_id=""}[1h]))': lambda samples: (
        [value for _, value in samples] == [0.0, 0.0]
    ),
    "sum by (reason) (rate(tasks_rejected_total[5m])) > 0": one(lambda rate: rate > 0, reason="INVALID_PARAMS"),
    'sum by (model_id) (model_state{state="Active"})': one(lambda value: value == 1, model_id="tiny-llama"),
    "max by (device) (gpu_utilization)": lambda samples: samples == [],
    "sum by (device) (vram_used_bytes)": lambda samples: samples == [],
}
"""What each query of the docs says here: ten tasks of eight tokens on a CPU, one refused, none cancelled."""


def test_every_query_of_the_docs_is_tried() -> None:
    assert sorted(documented_queries()) == sorted(EXPECTED)


def test_the_queries_of_the_docs_return_what_they_say(server: ServerProcess, prometheus: Prometheus) -> None:
    prometheus.until("tokens_out_total", lambda samples: len(samples) == 1)  # a rate counts from the first scrape on
    for number in range(10):
        task = server.post("/v1/tasks", prompt=f"river {number}", max_tokens=8, ignore_eos=True)
        assert b"event: end" in server.get(f"/v1/tasks/{task['task_id']}/stream")[1]
    with pytest.raises(urllib.error.HTTPError, match="400"):
        server.post("/v1/tasks", prompt="river", max_tokens=0)
    total = re.search(rb"^tokens_out_total\{.*\} (\S+)$", server.get("/metrics")[1], re.M)
    assert total is not None
    prometheus.until("tokens_out_total", one_value(float(total[1])))
    for query, holds in EXPECTED.items():
        prometheus.until(query, holds)


def one_value(value: float) -> Callable[[Samples], bool]:
    return lambda samples: [sample[1] for sample in samples] == [value]


def test_the_dashboards_queries_are_understood(prometheus: Prometheus) -> None:
    dashboard = json.loads((EXAMPLES / "monitoring/grafana-dashboard.json").read_text())
    prometheus.until("up", lambda samples: len(samples) == 1)
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            prometheus.query(target["expr"].replace("$__rate_interval", "1m").replace("$pool", ".*"))
