"""What the clients saw, and whether it adds up."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from orchd.client.sse import ServerEvent

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Accepted:
    """A task that got a 202.

    Attributes:
        request: What was sent.
        behaviour: Of its client.
        end: Data of its one `end` event.
        started: Whether it had a `started` event.
        heard: When its 202 was read, in monotonic seconds.
    """

    request: dict[str, Any]
    behaviour: str
    end: dict[str, Any] | None = None
    started: bool = False
    heard: float = field(default_factory=time.monotonic)


@dataclass
class Ledger:
    """Everything the clients were told, and every complaint.

    Attributes:
        tasks: By id.
        refused: Submits by error code.
        unanswered: Submits whose sender hung up before it could read an answer.
        reloads: By status.
    """

    tasks: dict[str, Accepted] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    reloads: Counter[int] = field(default_factory=Counter)
    streams: int = 0
    events: int = 0
    faults: list[str] = field(default_factory=list)

    def complain(self, what: str) -> None:
        self.faults.append(what)

    def check_stream(self, task_id: str, events: Sequence[ServerEvent], *, first: int = 0, whole: bool = True) -> None:
        """Ids count up without a gap; the order of kinds is right; a whole stream has its one end, which is noted."""
        self.streams += 1
        self.events += len(events)
        ids = [int(event.id) for event in events if event.id is not None]
        if ids != list(range(first, first + len(events))):
            self.complain(f"{task_id}: event ids {ids[:5]}... do not count up from {first}")
        kinds = [event.event for event in events]
        ends = kinds.count("end")
        if ends > 1 or (ends and kinds[-1] != "end") or (whole and not ends):
            self.complain(f"{task_id}: {ends} ends, the last event is {kinds[-1:]}")
        if any(kind != "token" for kind in kinds[1 if first == 0 and kinds[:1] == ["started"] else 0 :][:-1]):
            self.complain(f"{task_id}: kinds {kinds}")
        if ends and first == 0:
            self._note_end(task_id, events)

    def _note_end(self, task_id: str, events: Sequence[ServerEvent]) -> None:
        task = self.tasks[task_id]
        end = json.loads(events[-1].data)
        if task.end is not None and task.end != end:
            self.complain(f"{task_id}: two different ends: {task.end} and {end}")
        task.end, task.started = end, events[0].event == "started"
        text = "".join(json.loads(event.data)["t"] for event in events if event.event == "token")
        if any(stop in text for stop in task.request.get("stop", ())):
            self.complain(f"{task_id}: a stop string was streamed: {text!r}")
        if end["tokens_out"] > task.request["max_tokens"]:
            self.complain(f"{task_id}: {end['tokens_out']} tokens of at most {task.request['max_tokens']}")
        if not task.started and (text or end["finish_reason"] in ("stop", "length")):
            self.complain(f"{task_id}: it never started and has {end}")

    @property
    def reasons(self) -> Counter[str]:
        """Finish reasons of the ended tasks, an error's code with it."""
        ends = [task.end for task in self.tasks.values() if task.end is not None]
        return Counter(f"{end['finish_reason']} {end.get('error', {}).get('code', '')}".strip() for end in ends)

    def check_metrics(self, samples: Samples, prompt_tokens: int) -> list[str]:
        """Compare what the server counted with what its clients saw."""

        def total(name: str, **labels: str) -> float:
            return sum(
                v for (sample, has), v in samples.items() if sample == name and labels.items() <= dict(has).items()
            )

        wrong = []

        def expect(what: str, counted: float, least: int, most: int | None = None) -> None:
            if not least <= counted <= (least if most is None else most):
                wrong.append(f"{what}: the server counted {counted:.0f}, the clients {least}")

        tasks = self.tasks.values()
        expect("waiting tasks", total("queue_depth"), 0)
        for priority in ("interactive", "batch"):
            own = [task for task in tasks if task.request["priority"] == priority]
            expect(f"accepted {priority}", total("tasks_enqueued_total", priority=priority), len(own))
            never = sum(not task.started for task in own)
            expect(f"never started {priority}", total("tasks_enqueued_total", priority=priority, replica_id=""), never)
        tokens = sum(task.end["tokens_out"] for task in tasks if task.end)
        hung = self.reasons["error DECODE_TIMEOUT"]  # the step that hung may have brought each of them one more
        expect("output tokens", total("tokens_out_total"), tokens, tokens + hung)
        expect("prompt tokens", total("tokens_in_total"), prompt_tokens)
        for code in ("INVALID_PARAMS", "ADMISSION_REJECT", "POOL_UNREADY", "POOL_UNAVAILABLE", "INTERNAL"):
            seen = self.refused[code]
            expect(f"refused {code}", total("tasks_rejected_total", reason=code), seen, seen + self.unanswered)
        return wrong
