"""What `orchd health`, `run`, `reload` and `check` do once their options are read. Each returns the exit code.

Answers go to stdout and everything else to stderr, so that stdout can be piped anywhere.
"""

from __future__ import annotations

import asyncio
import enum
import os
import sys
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, ExitStack, aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.table import Table
from rich.text import Text

from orchd.cli.check import Checkup
from orchd.cli.console import console_for
from orchd.cli.report import show
from orchd.client import (
    BadAnswer,
    Client,
    End,
    Forbidden,
    Health,
    Message,
    NotReachable,
    Reasoning,
    Refused,
    TaskOptions,
    Token,
    Unauthorized,
    raise_if_failed,
)
from orchd.errors import ConfigError, OrchdError
from orchd.settings.config import Config


class Exit(enum.IntEnum):
    """What a command tells the shell."""

    OK = 0
    FAILED = 1
    NO_ANSWER = 2
    DEFECT = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141


NO_ANSWER: Final = (ConfigError, NotReachable, BadAnswer, Unauthorized, Forbidden)
"""The errors after which nothing is known about what was asked for."""

_PICTURES: Final = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(128, 160), 65533)
)
"""Control characters made visible: what a model writes must not be able to drive the terminal."""


Command = Coroutine[Any, Any, Exit]


@dataclass(frozen=True)
class Target:
    """Where a server is, and the token that opens it."""

    url: str
    token: str

    def client(self) -> Client:
        """A client for it, to be entered. Raises `ConfigError` if the address or the token cannot be one."""
        try:
            return Client(self.url, token=self.token)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def __repr__(self) -> str:
        return f"Target({self.url!r})"


def complain(message: object) -> None:
    """One line on stderr, whatever line breaks the message holds."""
    print(f"orchd: {' '.join(str(message).split())}", file=sys.stderr)


def finish(command: Callable[[], Command], *, interrupted: str | None = None) -> Exit:
    """Runs a command to its exit code; whatever goes wrong becomes one line on stderr.

    Args:
        command: Makes the coroutine to run; what this raises counts too.
        interrupted: What to say after Ctrl-C.
    """
    try:
        return asyncio.run(command())
    except KeyboardInterrupt:
        if interrupted is not None:
            complain(interrupted)
        return Exit.INTERRUPTED
    except UnicodeEncodeError:
        complain("an argument contains bytes that are not UTF-8; convert it, or pass the text on stdin")
        return Exit.NO_ANSWER
    except Unauthorized:
        complain("the server rejected this token; set the server's token with --token-file or ORCHD_TOKEN")
        return Exit.NO_ANSWER
    except OrchdError as error:
        complain(error)
        return Exit.NO_ANSWER if isinstance(error, NO_ANSWER) else Exit.FAILED


def output_lost(error: OSError) -> Exit:
    """What to leave with where stdout could not be written: there is no answer, so neither yes nor no."""
    if isinstance(error, ConnectionError):
        return Exit.BROKEN_PIPE  # whoever read it has left, as `head` does; no reason to complain
    complain(f"cannot write to stdout ({error.strerror}), so the answer is lost; redirect it elsewhere")
    return Exit.NO_ANSWER


async def health(target: Target, *, strict: bool, as_json: bool) -> Exit:
    """Asks a server how it is; no answer is an answer too."""
    async with target.client() as client:
        try:
            answer = await client.health()
        except Unauthorized:
            raise
        except Refused as error:  # with whatever status: it did not say how it is
            complain(error)
            return Exit.NO_ANSWER
    if as_json:
        _print_json(answer)
    else:
        _print_health(answer)
    if answer.ready and answer.status != "ok":
        complain(f"ready, but {answer.status}{_not_alive(answer)}")
    return Exit.OK if answer.ready and (answer.status == "ok" or not strict) else Exit.FAILED


async def reload(target: Target, pool_id: str, new_model_ref: str | None, *, as_json: bool) -> Exit:
    """Replaces a pool's model and says what it was, what it is now and how long that took."""
    async with target.client() as client:
        before = {pool.id: pool.model_id for pool in (await client.health()).pools}
        start = time.monotonic()
        with _status(f"reloading {pool_id}"):
            reloaded = await client.reload(pool_id, new_model_ref)
        seconds = time.monotonic() - start
    old, new = before.get(pool_id), reloaded.model_id
    if as_json:
        _print_json({"pool_id": pool_id, "old_model_id": old, "model_id": new, "seconds": round(seconds, 3)})
    else:
        print(f"{pool_id}: {old or 'no model'} → {new} in {seconds:.1f} s")
    return Exit.OK


def check(config: Config, *, token_file: Path | None, as_json: bool) -> Exit:
    """Explains a configuration; starts nothing."""
    with _status("checking devices and models"):
        report = Checkup(config, os.environ, token_file=token_file).run()
    if as_json:
        _print_json(report)
    else:
        show(report, console_for(sys.stdout))
    return Exit.OK if report.ok else Exit.FAILED


async def run(
    target: Target,
    *,
    prompt: str | None,
    messages: list[Message] | None,
    options: TaskOptions,
    max_wait_s: float,
    as_json: bool,
) -> Exit:
    """Submits a task and prints its text as it comes, or with `as_json` one object at its end."""
    text: list[str] = []
    reasoning: list[str] = []
    end: End | None = None
    printer = None if as_json else _Printer()
    async with target.client() as client:
        with _Waiting() as waiting:
            accepted = await client.submit(
                prompt=prompt, messages=messages, max_wait_s=max_wait_s, on_wait=waiting.for_room, **options
            )
            waiting.in_queue(accepted.queue_position, accepted.predicted_start_ms)
            async with aclosing(client.follow(accepted.task_id)) as events:
                async for event in events:
                    waiting.over()
                    if isinstance(event, Token):
                        text.append(event.text)
                        if printer is not None:
                            printer.answer(event.text)
                    elif isinstance(event, Reasoning):
                        reasoning.append(event.text)
                        if printer is not None:
                            printer.reasoning(event.text)
                    elif isinstance(event, End):
                        end = event
    if end is None:
        raise BadAnswer("the server closed the task's stream without an end event")
    if printer is not None:
        printer.close()
    else:
        answer = {
            "task_id": accepted.task_id,
            "text": "".join(text),
            **({"reasoning": "".join(reasoning)} if options.get("reasoning") else {}),
            "finish_reason": end.finish_reason,
            "tokens_out": end.tokens_out,
            "decode_ms": end.decode_ms,
        }
        _print_json(answer if end.error is None else answer | {"error": end.error})
    raise_if_failed(end, task_id=accepted.task_id)
    if printer is not None and not text and end.finish_reason == "length":
        complain(
            f"no answer within {end.tokens_out} tokens: the model was probably still thinking; raise "
            "--max-tokens, or try --template-arg enable_thinking=false"
        )
    return Exit.OK


class _Waiting:
    """One line on stderr, if that is a terminal, for as long as a task waits."""

    def __init__(self) -> None:
        self._line = ExitStack()

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *_: object) -> None:
        self.over()

    def for_room(self, refusal: Refused, pause_s: float) -> None:
        self._say(f"{refusal.message.rstrip('.')}; retrying in {pause_s:.1f} s")

    def in_queue(self, ahead: int, predicted_start_ms: int) -> None:
        if ahead or predicted_start_ms:
            self._say(f"waiting, {ahead} ahead" if ahead else "waiting, next in line")
        else:
            self.over()

    def over(self) -> None:
        self._line.close()

    def _say(self, line: str) -> None:
        self.over()
        self._line.enter_context(_status(line))


def _status(line: str) -> AbstractContextManager[object]:
    err = console_for(sys.stderr)
    return err.status(Text(line)) if err.is_terminal and not err.is_dumb_terminal else nullcontext()


class _Printer:
    """A task's text as it comes: the answer on stdout, and reasoning on stderr, dim where that is a terminal."""

    def __init__(self) -> None:
        self._last = ""  # of the answer
        self._thinks = False
        err = console_for(sys.stderr)
        self._dim = ("\x1b[2m", "\x1b[22m") if err.is_terminal and not err.is_dumb_terminal else ("", "")

    def reasoning(self, text: str) -> None:
        text = text.translate(_PICTURES) if sys.stderr.isatty() else text
        print(text.join(self._dim), end="", file=sys.stderr, flush=True)
        self._thinks = True

    def answer(self, text: str) -> None:
        self._end_reasoning("\n\n")
        sys.stdout.write(text.translate(_PICTURES) if sys.stdout.isatty() else text)
        sys.stdout.flush()
        self._last = text

    def close(self) -> None:
        """The next line of a terminal is a new one."""
        self._end_reasoning("\n")
        if self._last and sys.stdout.isatty() and not self._last.endswith("\n"):
            print()

    def _end_reasoning(self, with_text: str) -> None:
        if self._thinks:
            print(with_text, end="", file=sys.stderr, flush=True)
            self._thinks = False


def _print_json(answer: object) -> None:
    print(msgspec.json.encode(answer).decode())


def _not_alive(answer: Health) -> str:
    found = [
        f"{pool.id}/{replica.id} on {replica.device}"
        for pool in answer.pools
        for replica in pool.replicas
        if not replica.alive
    ]
    return f": not alive: {', '.join(found)}" if found else ""


def _print_health(answer: Health) -> None:
    out = console_for(sys.stdout)
    colour = {"ok": "green", "loading": "yellow", "degraded": "red"}[answer.status]
    table = Table("pool", "model", "replica", "device", "state", "busy", box=None, pad_edge=False)
    for pool in answer.pools:
        failed = pool.model_id is None and answer.status == "degraded"
        for replica in pool.replicas:
            state = ("ready" if pool.ready else "not ready") if replica.alive else "not alive"
            if failed:
                state = "failed to load, see the server's log"
            table.add_row(
                Text(pool.id),
                Text(pool.model_id or "-"),
                Text(replica.id),
                Text(replica.device),
                Text(state, "green" if state == "ready" else "red"),
                f"{replica.busy}/{replica.slots}",
            )
        if not pool.replicas:
            table.add_row(Text(pool.id), Text(pool.model_id or "-"), "-", "-", Text("not ready", "red"), "0/0")
    out.print(Text(answer.status, f"bold {colour}"))
    out.print(table)
