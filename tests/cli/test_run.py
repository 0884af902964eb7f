"""`orchd run`: what goes out, what a pipe, a terminal and a script get of the answer, and how it is left."""

from __future__ import annotations

import io
import itertools
import json
import signal
import subprocess

import pytest
from rich.console import Console
from rich.spinner import Spinner

from orchd.cli.waiting import Countdown
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
    figures = {"tokens_in": 5, "tokens_cached": 2, "tokens_out": 2, "decode_ms": 12}
    assert answer == {"text": "The Rhône", "finish_reason": "length"} | figures
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
    ("status", "code", "said", "told"),
    [
        (400, "INVALID_PARAMS", "Not like this.", "Not like this."),
        (
            400,
            "INVALID_PARAMS",
            "the prompt's 9 tokens and max_tokens 256 do not fit; lower max_tokens, or raise the pool's ctx",
            "the prompt's 9 tokens and --max-tokens 256 do not fit; lower --max-tokens, or raise the pool's ctx",
        ),
        (400, "INVALID_PARAMS", "x has no chat template; send prompt instead of messages", "; use --raw"),
        (400, "INVALID_PARAMS", "pool_id is required; available: a, b", "--pool is required; available: a, b"),
        (
            429,
            "ADMISSION_REJECT",
            "the queue is full (64 tasks); try again in 8.3 s",
            "the queue is full; there should be room in 9 s: let orchd wait with --wait 60",
        ),
        (503, "POOL_UNREADY", "the pool is loading; try again", "loading; try again, or let orchd wait with --wait 60"),
    ],
)
def test_a_refusal_is_1_and_in_the_words_of_the_command(
    server: StandIn, status: int, code: str, said: str, told: str
) -> None:
    server.on("POST /v1/tasks", s.refuse(status, code, said, {"Retry-After": "9"}))
    result = orchd("run", "hi", "--url", server.url)
    assert result.exit_code == 1
    assert one_line(result.stderr).endswith(f"{told}\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--temperature 9", "--temperature is '9', expected a number from 0 to 5"),
        ("--temperature warm", "--temperature is 'warm', expected a number from 0 to 5"),
        ("--max-tokens 0", "--max-tokens is '0', expected a whole number from 1 to"),
        ("--seed -1", "--seed is '-1', expected a whole number from 0 to"),
        ("--priority high", """--priority is 'high', expected "interactive" or "batch\""""),
        ("--wait -1", "--wait is '-1', expected a number from 0 to"),
        ("--wait", "option '--wait' requires an argument; see orchd"),
        ("--colour x", "no such option: --colour"),
        ("rivers, please", "put it in quotes: orchd run 'hi rivers, please'"),
    ],
)
def test_a_wrong_option_is_one_line_and_2(server: StandIn, options: str, told: str) -> None:
    result = orchd("run", "hi", "--url", server.url, *options.split())
    assert result.exit_code == 2
    assert told in one_line(result.stderr)
    assert server.seen == []


PROMPTS = [
    (["Summarise."], "a text\n", "Summarise.\n\na text"),
    (["Summarise."], "", "Summarise."),
    ([], "a text\n", "a text"),
    (["-"], "a text\n", "a text"),
]


@pytest.mark.parametrize(("arguments", "stdin", "content"), PROMPTS)
def test_the_prompt_then_the_text_on_stdin(server: StandIn, arguments: list[str], stdin: str, content: str) -> None:
    answering(server, "x")
    assert orchd("run", *arguments, "--url", server.url, stdin=stdin).exit_code == 0
    assert server.seen[0].body["messages"][-1]["content"] == content


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_no_text_at_all_is_one_line_and_2(server: StandIn, arguments: list[str]) -> None:
    result = orchd("run", *arguments, "--url", server.url, stdin="")
    assert result.exit_code == 2
    assert "stdin is empty" in one_line(result.stderr)
    assert server.seen == []


def test_a_terminal_without_a_prompt_is_not_read(server: StandIn) -> None:
    sent, code = on_terminal("run", "--url", server.url)
    assert (sent, code) == ("orchd: there is no prompt; use orchd run 'PROMPT', or pipe the text in\r\n", 2)


def test_a_pipe_that_stays_silent_is_told_of(server: StandIn) -> None:
    answering(server, "x")
    pipe = subprocess.PIPE
    with spawn("run", "hi", "--url", server.url, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stderr is not None
        assert "use < /dev/null" in process.stderr.readline()
        assert process.communicate(timeout=10)[0] == "x"


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


def test_a_full_queue_that_says_now_is_not_asked_again_and_again(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.refuse(429, "ADMISSION_REJECT", "Full.", {"X-Backoff-Ms": "1"}))
    assert orchd("run", "hi", "--wait", "1", "--url", server.url).exit_code == 1
    assert len(server.requests("POST /v1/tasks")) <= 6


def test_a_terminal_sees_when_the_next_try_is_and_when_it_starts(server: StandIn) -> None:
    full = "the queue is full (64 tasks); try again in 0.4 s"
    server.on("POST /v1/tasks", s.refuse(429, "ADMISSION_REJECT", full, {"X-Backoff-Ms": "400"}))
    server.on("POST /v1/tasks", s.accept(queue_position=1, predicted_start_ms=61_000))
    server.on("GET stream", s.stream(s.started(), s.token(1, "text"), s.end(2)))
    sent, code = on_terminal("run", "hi", "--wait", "30", "--url", server.url)
    assert "the queue is full (64 tasks); trying again in about 1 s" in sent
    assert "waiting, 1 ahead; starts in about 1 min 1 s" in sent
    assert code == 0


def test_a_countdown_counts_down_on_one_line() -> None:
    times = itertools.chain([0.0, 0.0, 31.5, 89.9, 90.0], itertools.repeat(200.0))
    line = Countdown("waiting, 3 ahead", "starts", 90, late="starts soon", clock=lambda: next(times))
    seen = [str(line).partition("; ")[2] for _ in range(5)]
    assert seen == [
        "starts in about 1 min 30 s",
        "starts in about 59 s",
        "starts in about 1 s",
        "starts soon",
        "starts soon",
    ]
    screen = io.StringIO()
    Console(file=screen, width=20).print(Spinner("line", line).render(0))
    assert screen.getvalue() == "- waiting, 3 ahead;…\n"


def test_a_dumb_terminal_gets_each_line_once(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.on("POST /v1/tasks", s.accept(queue_position=3, predicted_start_ms=900))
    server.on("GET stream", s.stream(s.started(), s.token(1, "text"), s.end(2)))
    sent, _ = on_terminal("run", "hi", "--url", server.url, term="dumb")
    assert sent == "waiting, 3 ahead; starts in about 1 s\r\ntext\r\n"


def test_ctrl_c_while_it_waits_takes_the_line_away(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.refuse(429, "ADMISSION_REJECT", "Full.", {"X-Backoff-Ms": "60000"}))
    sent, code = on_terminal("run", "hi", "--wait", "99", "--url", server.url, interrupt_at="in about")
    assert code == 130
    assert sent.endswith(("\x1b[2K", "\x1b[?25h", "\x1b[?25h\r\x1b[1A\x1b[2K"))


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


def test_a_terminal_shows_how_much_of_a_long_prompt_is_read(server: StandIn) -> None:
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), b": prompt 25/100\n\n", s.token(1, "a"), s.end(2)))
    sent, code = on_terminal("run", "hi", "--url", server.url)
    assert code == 0
    assert "reading the prompt, 25 % of 100 tokens" in sent
