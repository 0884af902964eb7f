"""Submits many prompts as `batch` tasks, at the pace the server asks for; interactive tasks always go first.

    python examples/batch.py prompts.txt answers.jsonl      # one prompt per line
    python examples/batch.py --count 1000 answers.jsonl     # or made-up prompts

Answers are appended in the order in which they finish. After Ctrl-C, start it again and it continues where it stopped:
prompts that already have an answer in the file are skipped.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orchd.client import Client, End, OrchdError, Priority, Refused, Token, raise_if_failed

MAX_WAIT_S = 3600.0
"""How long one prompt may wait for room in the queue before the job gives up."""


class Job:
    """Submits prompts and writes their answers to a file.

    Args:
        client: Open.
        out: Receives one JSON object per line.
        progress: Shows how far it is.
        total: Prompts to answer.
        max_tokens: Of each answer.
    """

    def __init__(self, client: Client, out: TextIO, progress: Progress, *, total: int, max_tokens: int) -> None:
        self._client = client
        self._out = out
        self._progress = progress
        self._bar = progress.add_task("answers", total=total, note="")
        self._max_tokens = max_tokens
        self._may_submit = asyncio.Lock()
        self.pauses = 0

    async def run(self, prompts: list[tuple[int, str]], in_flight: int) -> None:
        waiting = iter(prompts)

        async def worker() -> None:
            for number, prompt in waiting:
                await self._answer(number, prompt)

        await asyncio.gather(*(worker() for _ in range(in_flight)))

    async def _answer(self, number: int, prompt: str) -> None:
        # One submit at a time: when the queue is full, one worker waits for room and the others wait behind it.
        async with self._may_submit:
            accepted = await self._client.submit(
                prompt=prompt,
                priority=Priority.BATCH,
                max_tokens=self._max_tokens,
                max_wait_s=MAX_WAIT_S,
                on_wait=self._note_pause,
            )
            if accepted.backoff_ms:  # at least half full: leave room for others before the server refuses tasks
                self.pauses += 1
                await asyncio.sleep(accepted.backoff_ms / 1000)
        text = ""
        async for event in self._client.follow(accepted.task_id):
            if isinstance(event, Token):
                text += event.text
            elif isinstance(event, End):
                raise_if_failed(event, task_id=accepted.task_id)
                answer = {"number": number, "prompt": prompt, "text": text, "finish_reason": event.finish_reason}
                self._out.write(json.dumps(answer, ensure_ascii=False) + "\n")
                self._out.flush()
                self._progress.update(self._bar, advance=1, note="")

    def _note_pause(self, refusal: Refused, pause_s: float) -> None:
        self.pauses += 1
        self._progress.update(self._bar, note=f"queue full, retrying in {pause_s:.1f} s")


async def main() -> None:
    options = _options()
    prompts = list(enumerate(_prompts(options)))
    answered = _answered(options.out)
    left = [one for one in prompts if one not in answered]
    console = Console(stderr=True)
    columns = (SpinnerColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}", style="yellow"))
    with (
        options.out.open("a") as out,
        Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress,
    ):
        async with Client(options.url) as client:
            job = Job(client, out, progress, total=len(left), max_tokens=options.max_tokens)
            await job.run(left, options.in_flight)
    there = len(prompts) - len(left)
    console.print(f"answers in {options.out}: {len(left)} new, {there} from before; pauses: {job.pauses}")


def _answered(out: Path) -> set[tuple[int, str]]:
    """Number and prompt of each answer in the file; a line that was cut off, by a full disk say, is none."""
    if not out.exists():
        return set()
    lines = out.read_text()
    if lines and not lines.endswith("\n"):
        with out.open("a") as file:
            file.write("\n")
    found = set()
    for line in lines.splitlines():
        try:
            answer = json.loads(line)
            found.add((answer["number"], answer["prompt"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompts is None:
        return [f"Fact number {number} about rivers:" for number in range(options.count)]
    return [line for line in options.prompts.read_text().splitlines() if line.strip()]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Submit many prompts as batch tasks.")
    parser.add_argument("prompts", type=Path, nargs="?", help="one prompt per line")
    parser.add_argument("out", type=Path, help="JSON lines, appended to")
    parser.add_argument("--count", type=int, default=1000, help="number of made-up prompts, if no file is given")
    parser.add_argument("--in-flight", type=int, default=32, help="most tasks that may wait or run at once")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--url", help="address of the server, if not the configured one")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OrchdError, OSError, ValueError) as error:  # also an unreadable file, a full disk, a wrong --url
        sys.exit(f"{error}\nStart it again to continue where it stopped.")
