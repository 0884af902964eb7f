"""The engine alone inside a real Ray Serve on this machine. Left out where Ray is not installed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines.api import DeviceSpec, ModelSpec, SamplingParams, Sequence
from testkit.account import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: make test-ray"),
]

SERVE = """
import sys, time
import ray
from ray import serve
from examples.ray_serve.app import app

ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(app({"model": sys.argv[1], "gpus": "0", "replicas": "2", "slots": "2", "ctx": "512"}))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def url(tiny_model_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": where, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    command = [sys.executable, "-c", SERVE, str(tiny_model_path), str(port)]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line == "ready\n":
                    break
            else:
                pytest.fail(said)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):  # Ray's own processes, should any be left
                os.killpg(process.pid, signal.SIGKILL)


def ask(url: str, **fields: object) -> str:
    request = urllib.request.Request(url, json.dumps(fields).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def alone(model: Path, prompt: str, max_tokens: int) -> str:
    from engines.llamacpp.engine import LlamaCppEngine

    engine = LlamaCppEngine()
    vocab, loaded = engine.load_vocab(model), engine.load(ModelSpec(model, slots=2, ctx=512), DeviceSpec("cpu"))
    loaded.admit(Sequence("a", vocab.tokenize(prompt), max_tokens, sampling=SamplingParams(temperature=0)))
    text = ""
    while loaded.busy:
        text += "".join(event.text for event in loaded.step())
    loaded.close()
    vocab.close()
    return text


def test_many_requests_get_the_text_that_the_engine_writes_alone(url: str, tiny_model_path: Path) -> None:
    expected = alone(tiny_model_path, "the river", 30)
    assert expected
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(url, prompt="the river", max_tokens=30, temperature=0), range(16)))
    assert set(answers) == {expected}


def test_what_does_not_fit_is_refused(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask(url, prompt="the river", max_tokens=5000)


def test_who_leaves_frees_the_slot(url: str) -> None:
    for _ in range(8):  # more than there are slots
        request = urllib.request.Request(url, json.dumps({"prompt": "the river", "max_tokens": 400}).encode())
        urllib.request.urlopen(request, timeout=60).close()
    began = time.monotonic()
    assert ask(url, prompt="the river", max_tokens=5)
    assert time.monotonic() - began < 30
