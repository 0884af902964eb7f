"""A conversation in a terminal: reads messages, streams answers, and goes on whatever one of them comes to."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, Final, TypeVar

from orchd.cli.conversation import Conversation
from orchd.cli.exits import Exit, complain
from orchd.cli.line_input import read_message
from orchd.cli.terminal import print_piece
from orchd.cli.waiting import Waiting
from orchd.cli.words import of_run
from orchd.client import Client, End, TaskOptions, Token, raise_if_failed
from orchd.errors import OrchdError

HELP: Final = '''\
/system TEXT   set the system message; without TEXT, remove it
/retry         ask for another answer to the last message
/new           begin a new conversation
/exit, /quit   leave, as Ctrl-D does
A line that ends in \\ continues on the next one; """ begins and ends a message of several lines.
Ctrl-C stops an answer and keeps what is there. // begins a message with /.'''

T = TypeVar("T")


class Chat:
    """One conversation with one server.

    Args:
        client: Opened on `loop`.
        loop: Runs only while an answer is waited for, so that Ctrl-C means the answer, and else the line that is typed.
        conversation: With what has been said so far.
        options: Of each task.
        max_wait_s: How long to wait for room in a full queue.
    """

    def __init__(
        self,
        client: Client,
        loop: asyncio.AbstractEventLoop,
        conversation: Conversation,
        *,
        options: TaskOptions,
        max_wait_s: float,
    ) -> None:
        self._client = client
        self._loop = loop
        self._conversation = conversation
        self._options = options
        self._max_wait_s = max_wait_s
        self._failed = False

    def run(self) -> Exit:
        """Until the end of the input: 0, or 1 if a message from a pipe got no answer."""
        while True:
            try:
                message = read_message()
            except EOFError:
                if sys.stdin is not None and sys.stdin.isatty():
                    print(file=sys.stderr)
                break
            except KeyboardInterrupt:
                if sys.stdin is None or not sys.stdin.isatty():
                    raise
                print("\n(Ctrl-D leaves)", file=sys.stderr)
                continue
            if message.strip() in ("/exit", "/quit"):
                break
            if self._takes(message):
                self._answer()
        return Exit.FAILED if self._failed and not (sys.stdin is not None and sys.stdin.isatty()) else Exit.OK

    def _takes(self, message: str) -> bool:
        """Do what the message says; whether an answer is due."""
        command, _, text = message.strip().partition(" ")
        if not command:
            return False
        if not command.startswith("/") or command.startswith("//"):
            self._conversation.say(message[1:] if command.startswith("//") else message)
            return True
        if command == "/retry":
            if self._conversation.retry():
                return True
            self._say("there is nothing to answer yet")
        elif command == "/system":
            self._conversation.system = text.strip() or None
        elif command == "/new":
            self._conversation.clear()
        else:
            self._say(HELP if command == "/help" else f"there is no command {command}; /help lists them")
        return False

    def _answer(self) -> None:
        text: list[str] = []
        try:
            end = interruptible(self._loop, self._stream(text))
            raise_if_failed(end, task_id="")
            if end.finish_reason == "length":
                self._say(f"(cut off after {end.tokens_out} tokens; --max-tokens allows more)")
        except asyncio.CancelledError:
            self._say("(stopped)")
        except UnicodeEncodeError:
            self._fail("the message is not UTF-8")
        except OrchdError as error:
            self._fail(f"{of_run(error)}; /retry asks again")
        self._conversation.answer("".join(text))

    async def _stream(self, text: list[str]) -> End:
        """Prints the answer and keeps its pieces, also of one that is stopped."""
        try:
            with Waiting() as waiting:
                accepted = await self._client.submit(
                    messages=self._conversation.messages,
                    max_wait_s=self._max_wait_s,
                    on_wait=waiting.for_room,
                    **self._options,
                )
                waiting.in_queue(accepted.queue_position, accepted.predicted_start_ms)
                async with aclosing(self._client.follow(accepted.task_id, on_prompt=waiting.for_prompt)) as events:
                    async for event in events:
                        waiting.over()
                        if isinstance(event, Token):
                            text.append(event.text)
                            print_piece(event.text)
                        elif isinstance(event, End):
                            return event
        finally:
            if text and not text[-1].endswith("\n"):
                print_piece("\n")
        raise OrchdError("the server closed the stream without an end event")

    def _fail(self, message: str) -> None:
        self._failed = True
        complain(message)

    def _say(self, note: str) -> None:
        """Something that is not the model's."""
        print(note, file=sys.stderr)


def interruptible(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Run to its end; Ctrl-C cancels it, and `asyncio.CancelledError` is raised once it has cleaned up."""
    task = loop.create_task(work)
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        return loop.run_until_complete(task)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
