"""`orchd run`: what goes out, what a pipe, a terminal and a script get of the answer, and how it is left."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from testkit import stand_in as s
from testkit.stand_in import StandIn
from tests.cli.shell import answering, on_terminal, one_line, orchd, spawn


def test_run_prints_the_text_and_nothing_else(server: StandIn) -> None:
    answering(server, "The", " Rhône")
    result = orchd("run", "Name a river.", "--url", server.url)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "The Rhône", "")
    assert server.seen[0].body["messages"] == [{"role": "user", "content": "Name a river."}]


def test_run_sends_what_it_was_told(server: StandIn) -> None:
    answering(server, "x")
    options = "--template-arg enable_thinking=false --template-arg n=2 --template-arg effort=low --template-arg s="
    options += " --pool p --model-ref m --priority batch --max-tokens 5 --seed 7 --temperature 0 --stop A --stop B"
    orchd("run", "hi", "--system", "Be brief.", *options.split(), "--url", server.url)
    body = server.seen[0].body
    del body["task_id"]
    assert body == {
        "pool_id": "p",
        "model_ref": "m",
        "priority": "batch",
        "max_tokens": 5,
        "seed": 7,
        "temperature": 0,
        "chat_template_kwargs": {"enable_thinking": False, "n": 2, "effort": "low", "s": ""},
        "stop": ["A", "B"],
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    }


@pytest.mark.parametrize(("flags", "content"), [([], "from stdin"), (["--raw"], "from stdin\n")])
def test_run_reads_stdin(server: StandIn, flags: list[str], content: str) -> None:
    answering(server, "x")
    orchd("run", "-", *flags, "--url", server.url, stdin="from stdin\n")
    body = server.seen[0].body
    assert (body["prompt"] if flags else body["messages"][0]["content"]) == content


def test_stdin_that_is_no_text_is_one_line_and_2(server: StandIn) -> None:
    result = orchd("run", "-", "--url", server.url, stdin=b"ab\xff")
    assert result.exit_code == 2
    assert "not UTF-8 at byte 2" in one_line(result.stderr)
    assert server.seen == []


def test_an_argument_that_is_no_text_is_one_line_and_2(server: StandIn) -> None:
    result = orchd("run", "caf\udce9", "--url", server.url)
    assert result.exit_code == 2
    assert "not UTF-8" in one_line(result.stderr)
    assert server.seen == []


def test_a_terminal_without_unicode_is_no_reason_to_fail(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    answering(server, "Rhône")
    assert on_terminal("run", "hi", "--url", server.url) == ("Rh?ne\r\n", 0)


@pytest.mark.parametrize(
    "wrong", ["--raw --system x", "--raw --template-arg a=1", "--template-arg a", "--raw --reasoning"]
)
def test_what_needs_a_template_and_gets_none_is_a_wrong_option(server: StandIn, wrong: str) -> None:
    result = orchd("run", "hi", *wrong.split(), "--url", server.url)
    assert result.exit_code == 2
    assert server.seen == []


def test_run_as_json_is_one_object_at_the_end(server: StandIn) -> None:
    answering(server, "The", " Rhône", reason="length")
    result = orchd("run", "hi", "--json", "--url", server.url)
    answer = json.loads(result.stdout)
    assert answer.pop("task_id") == server.seen[0].body["task_id"]
    assert answer == {"text": "The Rhône", "finish_reason": "length", "tokens_out": 2, "decode_ms": 12}
    assert result.exit_code == 0


def thinking(server: StandIn, *, answer: str = "The Rhône", reason: str = "stop") -> None:
    server.on("POST /v1/tasks", s.accept())
    texts = [s.token(3, answer)] if answer else []
    thoughts = [s.reasoning(1, "Rivers\x07:"), s.reasoning(2, " one")]
    server.on("GET stream", s.stream(s.started(), *thoughts, *texts, s.end(3 + len(texts), reason)))


def test_reasoning_goes_to_stderr_and_the_answer_to_stdout(server: StandIn) -> None:
    thinking(server)
    result = orchd("run", "hi", "--reasoning", "--url", server.url)
    assert server.seen[0].body["reasoning"] is True
    assert (result.exit_code, result.stdout, result.stderr) == (0, "The Rhône", "Rivers\x07: one\n\n")


def test_a_terminal_sees_reasoning_dim_and_without_control_characters(server: StandIn) -> None:
    thinking(server)
    sent, code = on_terminal("run", "hi", "--reasoning", "--url", server.url)
    assert (sent, code) == ("\x1b[2mRivers␇:\x1b[22m\x1b[2m one\x1b[22m\r\n\r\nThe Rhône\r\n", 0)


def test_reasoning_as_json_is_a_field(server: StandIn) -> None:
    thinking(server)
    answer = json.loads(orchd("run", "hi", "--reasoning", "--json", "--url", server.url).stdout)
    assert (answer["text"], answer["reasoning"]) == ("The Rhône", "Rivers\x07: one")


@pytest.mark.parametrize("flags", [[], ["--reasoning"]])
def test_a_model_that_never_comes_to_its_answer_is_told_so(server: StandIn, flags: list[str]) -> None:
    thinking(server, answer="", reason="length")
    result = orchd("run", "hi", *flags, "--url", server.url)
    assert (result.exit_code, result.stdout) == (0, "")
    assert one_line(result.stderr.splitlines(keepends=True)[-1]).startswith("orchd: no answer within 2 tokens")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_task_that_fails_is_1(server: StandIn, flags: list[str]) -> None:
    error = {"code": "WORKER_RESET", "message": "The step failed.", "engine": "llamacpp"}
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, "The"), s.end(2, "error", error=error)))
    result = orchd("run", "hi", *flags, "--url", server.url)
    assert result.exit_code == 1
    assert one_line(result.stderr) == "orchd: The step failed.\n"
    assert json.loads(result.stdout)["error"] == error if flags else result.stdout == "The"


@pytest.mark.parametrize(
    ("status", "code"), [(400, "INVALID_PARAMS"), (429, "ADMISSION_REJECT"), (503, "POOL_UNREADY")]
)
def test_a_refusal_is_1(server: StandIn, status: int, code: str) -> None:
    server.on("POST /v1/tasks", s.refuse(status, code, "Not like this.", {"Retry-After": "9"}))
    result = orchd("run", "hi", "--url", server.url)
    assert (result.exit_code, result.stderr) == (1, "orchd: Not like this.\n")


def test_run_waits_for_room_if_told_to(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.refuse(429, "ADMISSION_REJECT", "Full.", {"X-Backoff-Ms": "10"}))
    answering(server, "x")
    assert orchd("run", "hi", "--wait", "30", "--url", server.url).stdout == "x"


def test_a_terminal_gets_a_newline_and_no_control_characters_from_the_model(server: StandIn) -> None:
    answering(server, "a\x1b]0;title\x07", "\tb")
    sent, code = on_terminal("run", "hi", "--url", server.url)
    assert (sent, code) == ("a␛]0;title␇\tb\r\n", 0)


def test_a_pipe_gets_the_models_text_as_it_is(server: StandIn) -> None:
    answering(server, "a\x1b[31m")
    assert orchd("run", "hi", "--url", server.url).stdout == "a\x1b[31m"


def test_a_terminal_sees_its_place_in_the_queue_until_text_comes(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept(queue_position=3, predicted_start_ms=900))
    server.on("GET stream", s.stream(s.started(), s.token(1, "text"), s.end(2)))
    sent, code = on_terminal("run", "hi", "--url", server.url)
    assert "waiting, 3 ahead" in sent
    assert sent.index("waiting") < sent.index("text")
    assert code == 0


def test_ctrl_c_leaves_the_stream_with_130(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, "The"), then="stay"))
    with spawn("run", "hi", "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == "The"
        process.send_signal(signal.SIGINT)
        assert server.left.wait(10)
        rest, errors = process.communicate(timeout=10)
    assert (process.returncode, rest, errors) == (130, "", "")


def test_a_reader_that_leaves_is_no_error_to_talk_about(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), *[s.token(n, "x" * 1000) for n in range(1, 200)], then="stay"))
    with spawn("run", "hi", "--url", server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert server.left.wait(10)
        assert process.stderr.read() == ""
        assert process.wait(10) == 141
