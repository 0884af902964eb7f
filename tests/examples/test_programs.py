"""Every program in `examples/` is started as its first lines say, against a real server."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from testkit.account import EXAMPLES, ServerProcess


def test_curl_submits_and_streams(server: ServerProcess) -> None:
    done = server.run(EXAMPLES / "curl.sh")
    assert done.returncode == 0, done.stderr
    answer, _, stream = done.stdout.partition("\n")
    assert set(json.loads(answer)) == {"task_id", "queue_position", "predicted_start_ms", "backoff_ms"}
    kinds = re.findall(r"^event: (\w+)$", stream, re.M)
    assert (kinds[0], kinds[-1], set(kinds[1:-1])) == ("started", "end", {"token"})


def test_curl_shows_a_refusal(server: ServerProcess) -> None:
    done = server.run(EXAMPLES / "curl.sh", ORCHD_TOKEN="not-the-token-0123456789")
    assert done.returncode != 0
    assert json.loads(done.stdout.splitlines()[0])["code"] == "UNAUTHORIZED"


@pytest.mark.parametrize("name", ["python_client.py", "python_httpx.py"])
def test_python_prints_the_answer(server: ServerProcess, name: str) -> None:
    done = server.run(sys.executable, EXAMPLES / name, "the river")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) > 5


@pytest.mark.parametrize("name", ["python_client.py", "python_httpx.py"])
def test_python_ends_with_a_sentence(server: ServerProcess, name: str) -> None:
    done = server.run(sys.executable, EXAMPLES / name, "hi", ORCHD_TOKEN="not-the-token-0123456789")
    assert done.returncode == 1
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js; sudo apt install nodejs")
def test_node_prints_the_answer(server: ServerProcess) -> None:
    done = server.run("node", EXAMPLES / "node_fetch.mjs", "the river")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\n\[(stop|length), \d+ tokens\]\n$", done.stdout)


def test_a_batch_of_50_is_done_through_a_queue_of_4(server: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    options = ["--count", "50", "--max-tokens", "128", "--in-flight", "16", str(out)]
    done = server.run(sys.executable, EXAMPLES / "batch.py", *options)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(answer["number"] for answer in answers) == list(range(50))
    assert all(answer["text"] for answer in answers)
    paused = re.search(r"pauses: (\d+)", done.stderr)
    assert paused is not None
    assert int(paused[1]) > 0


def test_a_batch_goes_on_where_it_was(server: ServerProcess, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("one\n\ntwo\nthree\n")
    other = '{"number": 2, "prompt": "another one", "text": "of another job"}'
    cut = '{"number": 0, "prompt": "one", "te'
    out.write_text(f'{{"number": 1, "prompt": "two", "text": "as it was"}}\n{other}\n{cut}')
    done = server.run(sys.executable, EXAMPLES / "batch.py", prompts, out, "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    lines = out.read_text().splitlines()
    assert lines[1:3] == [other, cut]
    answers = {(answer := json.loads(line))["number"]: answer for line in lines if line != cut}
    assert answers[1]["text"] == "as it was"
    assert (answers[0]["prompt"], answers[2]["prompt"]) == ("one", "three")
    assert "2 new, 1 from before" in " ".join(done.stderr.split())
