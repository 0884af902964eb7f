"""What workers post arrives on the loop, all of it, in order and soon, with few wake-ups."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from typing import Any, cast

import pytest

from engines.api import FinishReason
from orchd.mailbox import PERIOD_S, Mailbox
from orchd.reports import Begun, Ended, Progress, Report
from orchd.tasks import Task
from tests.core.builders import make_task


class Loop:
    """A loop that keeps what it is asked to do until the test does it."""

    def __init__(self) -> None:
        self.woken: list[Any] = []
        self.later: list[Any] = []
        self.now_s = 100.0

    def time(self) -> float:
        return self.now_s

    def call_soon_threadsafe(self, call: Any) -> None:
        self.woken.append(call)

    def call_later(self, _delay_s: float, call: Any) -> None:
        self.later.append(call)


class Box:
    def __init__(self) -> None:
        self.loop = Loop()
        self.applied: list[Report] = []
        self.mailbox = Mailbox(self.applied.append, cast(asyncio.AbstractEventLoop, self.loop))
        self.task = make_task()

    def text(self, index: int) -> Progress:
        return Progress(self.task, "a", index)

    def stream(self) -> None:
        """The texts 0 and 1, one right after the other."""
        for index in range(2):
            self.mailbox.post([self.text(index)])
            self.turn()

    def turn(self) -> None:
        """The loop does what it was woken for."""
        woken, self.loop.woken = self.loop.woken, []
        for call in woken:
            call()

    def tick(self) -> None:
        """The period is over."""
        self.loop.now_s += PERIOD_S
        later, self.loop.later = self.loop.later, []
        for call in later:
            call()


def test_what_follows_two_quick_texts_waits_for_the_loops_look() -> None:
    box = Box()
    box.stream()
    box.mailbox.post([box.text(2)])
    box.mailbox.post([box.text(3)])
    assert not box.loop.woken
    box.tick()
    assert box.applied == [box.text(index) for index in range(4)]
    box.mailbox.post([box.text(4)])
    assert not box.loop.woken  # as long as its looks find something


def test_each_of_some_slow_texts_wakes_the_loop_and_nothing_else_does() -> None:
    box = Box()
    for index in range(5):
        box.mailbox.post([box.text(index)])
        assert len(box.loop.woken) == 1
        box.turn()
        assert not box.loop.later
        box.loop.now_s += PERIOD_S * 1.1


@pytest.mark.parametrize("kind", [Begun, lambda task: Ended(task, FinishReason.STOP)])
def test_a_begin_or_an_end_is_not_kept_waiting_and_overtakes_nothing(kind: Any) -> None:
    box = Box()
    box.stream()
    box.mailbox.post([box.text(2)])
    box.mailbox.post([kind(box.task)])
    box.turn()
    assert box.applied == [*(box.text(index) for index in range(3)), kind(box.task)]
    assert len(box.loop.later) == 1


def test_a_look_that_finds_nothing_is_the_last() -> None:
    box = Box()
    box.stream()
    box.tick()
    assert not box.loop.later
    box.mailbox.post([box.text(2)])
    box.turn()
    assert box.applied == [box.text(index) for index in range(3)]


def test_a_task_that_begins_lets_its_first_text_wake_the_loop() -> None:
    box = Box()
    box.mailbox.post([Begun(box.task)])
    box.turn()
    assert not box.loop.later
    box.mailbox.post([box.text(0)])
    assert box.loop.woken


async def test_all_arrives_in_each_threads_order() -> None:
    threads, each = 4, 5_000
    got: dict[str, list[int]] = defaultdict(list)
    done = asyncio.Event()
    left = threads

    def apply(report: Report) -> None:
        nonlocal left
        if isinstance(report, Progress):
            got[report.task.id].append(report.index)
        else:
            left -= 1
            if not left:
                done.set()

    mailbox = Mailbox(apply, asyncio.get_running_loop())

    def work(task: Task) -> None:
        for index in range(each):
            mailbox.post([Progress(task, "a", index)])
        mailbox.post([Ended(task, FinishReason.LENGTH)])

    workers = [threading.Thread(target=work, args=(make_task(),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    await asyncio.wait_for(done.wait(), 20)
    for worker in workers:
        worker.join()
    assert len(got) == threads
    assert all(indices == list(range(each)) for indices in got.values())


async def test_the_last_text_arrives_without_anything_after_it() -> None:
    task, each = make_task(), 200
    last = asyncio.Event()

    def apply(report: Report) -> None:
        if isinstance(report, Progress) and report.index == each - 1:
            last.set()

    mailbox = Mailbox(apply, asyncio.get_running_loop())

    def work() -> None:
        for index in range(each):
            mailbox.post([Progress(task, "a", index)])

    for _ in range(20):
        last.clear()
        await asyncio.to_thread(work)
        await asyncio.wait_for(last.wait(), 20)


def test_a_loop_that_is_closed_is_told_nothing() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(lambda report: None, loop)
    loop.close()
    mailbox.post([Begun(make_task())])
