"""One task: submitted, waited for, and its answer printed as it comes."""

from __future__ import annotations

import sys
from contextlib import aclosing

from orchd.cli.outcome import Exit
from orchd.cli.target import Target
from orchd.cli.terminal import print_json, print_piece
from orchd.cli.waiting import Waiting
from orchd.client import BadAnswer, End, Message, TaskOptions, Token, raise_if_failed


async def ask(
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
    end: End | None = None
    async with target.client() as client:
        with Waiting() as waiting:
            accepted = await client.submit(
                prompt=prompt, messages=messages, max_wait_s=max_wait_s, on_wait=waiting.for_room, **options
            )
            waiting.in_queue(accepted.queue_position, accepted.predicted_start_ms)
            async with aclosing(client.follow(accepted.task_id)) as events:
                async for event in events:
                    waiting.over()
                    if isinstance(event, Token):
                        text.append(event.text)
                        if not as_json:
                            print_piece(event.text)
                    elif isinstance(event, End):
                        end = event
    if end is None:
        raise BadAnswer("the server closed the task's stream without an end event")
    if as_json:
        answer = {
            "task_id": accepted.task_id,
            "text": "".join(text),
            "finish_reason": end.finish_reason,
            "tokens_out": end.tokens_out,
            "decode_ms": end.decode_ms,
        }
        print_json(answer if end.error is None else answer | {"error": end.error})
    elif text and sys.stdout.isatty() and not text[-1].endswith("\n"):
        print()
    raise_if_failed(end, task_id=accepted.task_id)
    return Exit.OK
