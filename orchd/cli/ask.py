"""One task: submitted, waited for, and its answer printed as it comes."""

from __future__ import annotations

from contextlib import aclosing

from orchd.cli.outcome import Exit, complain
from orchd.cli.target import Target
from orchd.cli.terminal import Printer, print_json
from orchd.cli.waiting import Waiting
from orchd.client import BadAnswer, End, Message, Reasoning, TaskOptions, Token, raise_if_failed


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
    reasoning: list[str] = []
    end: End | None = None
    printer = None if as_json else Printer()
    async with target.client() as client:
        with Waiting() as waiting:
            accepted = await client.submit(
                prompt=prompt, messages=messages, max_wait_s=max_wait_s, on_wait=waiting.for_room, **options
            )
            waiting.in_queue(accepted.queue_position, accepted.predicted_start_ms)
            async with aclosing(client.follow(accepted.task_id, on_prompt=waiting.for_prompt)) as events:
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
            "tokens_in": end.tokens_in,
            "tokens_cached": end.tokens_cached,
            "tokens_out": end.tokens_out,
            "decode_ms": end.decode_ms,
        }
        print_json(answer if end.error is None else answer | {"error": end.error})
    raise_if_failed(end, task_id=accepted.task_id)
    if printer is not None and not text and end.finish_reason == "length":
        complain(
            f"no answer within {end.tokens_out} tokens: the model was probably still thinking; raise "
            "--max-tokens, or try --template-arg enable_thinking=false"
        )
    return Exit.OK
