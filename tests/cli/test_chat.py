"""`orchd chat`: a conversation typed at a terminal, and one that comes through a pipe."""

from __future__ import annotations

from typing import Any

import pytest

from orchd.cli.conversation import Conversation
from testkit import stand_in as s
from testkit.stand_in import StandIn
from tests.cli.shell import on_terminal, one_line, orchd


def answers(server: StandIn, *texts: str) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    server.on("POST /v1/tasks", s.accept())
    for text in texts:
        server.on("GET stream", s.stream(s.started(), s.token(1, text), s.end(2)))


def sent_turns(server: StandIn) -> list[list[str]]:
    """What each task was sent: the first letter of each role, and the text."""
    bodies: list[Any] = [seen.body for seen in server.requests("POST /v1/tasks")]
    return [[f"{turn['role'][0]}:{turn['content']}" for turn in body["messages"]] for body in bodies]


def test_each_message_goes_with_all_that_was_said(server: StandIn) -> None:
    answers(server, "one", "two")
    result = orchd("chat", "--system", "Be brief.", "--url", server.url, stdin="first\nsecond\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "one\ntwo\n", "")
    assert sent_turns(server) == [["s:Be brief.", "u:first"], ["s:Be brief.", "u:first", "a:one", "u:second"]]
    assert server.requests("POST /v1/tasks")[0].body["max_tokens"] == 128  # a quarter of the context


def test_commands(server: StandIn) -> None:
    answers(server, "one", "two", "three", "four")
    typed = "first\n/retry\n/system Be brief.\nsecond\n/new\n//third\n/exit\nnever\n"
    assert orchd("chat", "--url", server.url, stdin=typed).exit_code == 0
    assert sent_turns(server) == [
        ["u:first"],
        ["u:first"],
        ["s:Be brief.", "u:first", "a:two", "u:second"],
        ["s:Be brief.", "u:/third"],
    ]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("one\\\ntwo\n", "one\ntwo"),
        ('"""one\n\ntwo"""\n', "one\n\ntwo"),
        ('"""\none\ntwo\n"""\n', "one\ntwo"),
        ('"""one"""\n', "one"),
    ],
)
def test_a_message_of_several_lines(server: StandIn, typed: str, message: str) -> None:
    answers(server, "x")
    orchd("chat", "--url", server.url, stdin=typed)
    assert sent_turns(server) == [[f"u:{message}"]]


def test_an_unknown_command_and_an_early_retry_are_told(server: StandIn) -> None:
    answers(server, "x")
    result = orchd("chat", "--url", server.url, stdin="/retry\n/rety\n/help\n\n")
    assert "nothing to answer yet" in result.stderr
    assert "no command /rety; /help lists them" in result.stderr
    assert "/system TEXT" in result.stderr
    assert sent_turns(server) == []


def test_a_refused_message_does_not_end_the_conversation_and_gives_way_to_the_next(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    server.on("POST /v1/tasks", s.refuse(400, "INVALID_PARAMS", "too long; shorten it"), s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, "x"), s.end(2)))
    result = orchd("chat", "--url", server.url, stdin="long\nshort\n")
    assert (result.exit_code, result.stdout) == (1, "x\n")
    assert one_line(result.stderr) == "orchd: too long; shorten it; /retry asks again\n"
    assert sent_turns(server) == [["u:long"], ["u:short"]]


def test_several_pools_need_a_name(server: StandIn) -> None:
    body: Any = s.health_body()
    body["pools"].append(body["pools"][0] | {"id": "coder"})
    server.on("GET /health", s.answer(body))
    for arguments in ([], ["--pool", "x"]):
        result = orchd("chat", *arguments, "--url", server.url, stdin="")
        assert result.exit_code == 2
        assert "available: default, coder" in one_line(result.stderr)


def test_on_a_terminal(server: StandIn) -> None:
    answers(server, "one\x1b[31m", "two")
    keys = [("> ", "first\n"), ("> ", "second\n"), ("> ", "\x04")]
    shown, code = on_terminal("chat", "--url", server.url, typed=keys)
    assert code == 0
    assert "tiny-llama; /help for help, Ctrl-D leaves" in shown
    assert "one␛[31m\r\n" in shown
    assert "two\r\n" in shown


def test_ctrl_c_stops_an_answer_and_keeps_it(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    server.on("POST /v1/tasks", s.accept())
    server.on("GET stream", s.stream(s.started(), s.token(1, "half"), then="stay"))
    server.on("GET stream", s.stream(s.started(), s.token(1, "whole"), s.end(2)))
    keys = [("> ", "first\n"), ("half", "\x03"), ("> ", "second\n"), ("> ", "\x04")]
    shown, code = on_terminal("chat", "--url", server.url, typed=keys)
    assert code == 0
    assert "(stopped)" in shown
    assert server.left.is_set()
    assert sent_turns(server)[1] == ["u:first", "a:half", "u:second"]


def test_ctrl_c_while_a_line_is_typed_drops_the_line(server: StandIn) -> None:
    answers(server, "x")
    keys = [("> ", "\x03"), ("(Ctrl-D leaves)\r\n> ", "first\n"), ("> ", "\x04")]
    assert on_terminal("chat", "--url", server.url, typed=keys)[1] == 0
    assert sent_turns(server) == [["u:first"]]


def test_ctrl_c_while_the_queue_is_full_gives_up_on_the_message(server: StandIn) -> None:
    server.on("GET /health", s.answer(s.health_body()))
    server.on("POST /v1/tasks", s.refuse(429, "ADMISSION_REJECT", "Full.", {"X-Backoff-Ms": "60000"}))
    keys = [("> ", "first\n"), ("in about", "\x03"), ("(stopped)\r\n> ", "\x04")]
    assert on_terminal("chat", "--url", server.url, typed=keys)[1] == 0


def test_turns_without_an_answer_do_not_stay() -> None:
    talk = Conversation()
    talk.say("a")
    talk.answer("")
    talk.say("b")
    assert [turn.content for turn in talk.messages] == ["b"]
    assert talk.retry()
    assert [turn.content for turn in talk.messages] == ["b"]
