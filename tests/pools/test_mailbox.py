"""What workers post arrives on the loop, all of it, in order and soon, with few wake-ups."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import defaultdict
from typing import Any, cast

import pytest

from engines.api import FinishReason
from orchd.pools.mailbox import LONGEST_S, SHORTEST_S, TOGETHER, WORTH_A_LOOK, Mailbox
from orchd.pools.replica import Replica
from orchd.pools.reports import Begun, Ended, Progress, Report
from orchd.queue.tasks import Task
from testkit.builders import make_task
from tests.pools.rig import make_rig


class Loop:
    """A loop that keeps what it is asked to do until the test does it."""

    def __init__(self) -> None:
        self.woken: list[Any] = []
        self.later: list[tuple[float, Any]] = []
        self.now_s = 100.0

    def time(self) -> float:
        return self.now_s

    def call_soon_threadsafe(self, call: Any) -> None:
        self.woken.append(call)

    def call_later(self, delay_s: float, call: Any) -> None:
        self.later.append((self.now_s + delay_s, call))


@functools.cache
def a_replica() -> Replica:
    [replica] = make_rig().pools[0].replicas
    return replica


class Box:
    def __init__(self) -> None:
        self.loop = Loop()
        self.applied: list[Report] = []
        self.posted_s: list[float] = []  # by `run`
        self.mailbox = Mailbox(self.applied.append, cast(asyncio.AbstractEventLoop, self.loop))
        self.task = make_task()

    def text(self, index: int, *, first: bool = False) -> Progress:
        return Progress(self.task, "a", index, first)

    def post(self, *reports: Report) -> None:
        """Post them, and let the loop do what that wakes it for."""
        self.mailbox.post(list(reports))
        self.turn()

    def stream(self) -> None:
        """The texts 0 and 1, one right after the other."""
        for index in range(2):
            self.post(self.text(index))

    def turn(self) -> None:
        """The loop does what it was woken for."""
        woken, self.loop.woken = self.loop.woken, []
        for call in woken:
            call()

    def tick(self) -> None:
        """The loop's next look."""
        (self.loop.now_s, look), *self.loop.later = self.loop.later
        look()

    def run(self, every_s: float, texts: int) -> tuple[int, float]:
        """Text at a steady pace; how often the loop woke up, and the longest that one waited."""
        wakes, waited_s = 0, [0.0]
        for due_s in [self.loop.now_s + (n + 1) * every_s for n in range(texts)]:
            while self.loop.later and self.loop.later[0][0] <= due_s:
                seen, wakes = len(self.applied), wakes + 1
                self.tick()
                waited_s += [self.loop.now_s - posted_s for posted_s in self.posted_s[seen : len(self.applied)]]
            self.loop.now_s = due_s
            self.posted_s.append(due_s)
            self.mailbox.post([self.text(len(self.posted_s))])
            wakes += len(self.loop.woken)
            self.turn()
        return wakes, max(waited_s)


def test_what_follows_two_quick_texts_waits_for_the_loops_look() -> None:
    box = Box()
    box.stream()
    box.mailbox.post([box.text(2)])
    box.mailbox.post([box.text(3)])
    assert not box.loop.woken
    box.tick()
    assert box.applied == [box.text(index) for index in range(4)]
    box.mailbox.post([box.text(4)])
    assert not box.loop.woken  # as long as its looks find enough


def test_each_of_some_slow_texts_wakes_the_loop_and_nothing_else_does() -> None:
    box = Box()
    for index in range(5):
        box.mailbox.post([box.text(index)])
        assert len(box.loop.woken) == 1
        box.turn()
        assert not box.loop.later
        box.loop.now_s += LONGEST_S / WORTH_A_LOOK * 1.01


@pytest.mark.parametrize("every_s", [0.0001, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.006, 0.008])
def test_quick_texts_come_some_together_and_none_waits_longer_than_a_picture(every_s: float) -> None:
    box = Box()
    texts = 2000
    wakes, longest_s = box.run(every_s, texts)
    together = max(SHORTEST_S, min(every_s * TOGETHER, LONGEST_S)) / every_s
    assert wakes <= texts / together * 1.1 + 2
    assert longest_s <= LONGEST_S * 1.001


@pytest.mark.parametrize("every_s", [0.0085, 0.01, 0.015, 0.03])
def test_texts_that_are_not_worth_gathering_do_not_wait_at_all(every_s: float) -> None:
    box = Box()
    box.run(0.005, 20)  # quick ones before
    box.run(every_s, 5)
    wakes, longest_s = box.run(every_s, 50)
    assert (wakes, longest_s) == (50, 0)


@pytest.mark.parametrize("kind", [lambda task: Begun(task, a_replica()), lambda task: Ended(task, FinishReason.STOP)])
def test_a_begin_or_an_end_is_not_kept_waiting_and_overtakes_nothing(kind: Any) -> None:
    box = Box()
    box.stream()
    box.mailbox.post([box.text(2)])
    box.post(kind(box.task))
    assert box.applied == [*(box.text(index) for index in range(3)), kind(box.task)]
    assert len(box.loop.later) == 1


def test_a_tasks_first_text_is_not_kept_waiting() -> None:
    box = Box()
    box.stream()
    box.post(box.text(2), box.text(0, first=True))
    assert box.applied[2:] == [box.text(2), box.text(0, first=True)]


@pytest.mark.parametrize("found", range(WORTH_A_LOOK))
def test_a_look_that_finds_too_little_is_the_last(found: int) -> None:
    box = Box()
    box.stream()
    for index in range(found):
        box.post(box.text(2 + index))
    box.tick()
    assert len(box.applied) == 2 + found
    assert not box.loop.later
    box.post(box.text(9))
    assert box.applied[-1] == box.text(9)


def test_a_task_that_begins_lets_its_first_text_wake_the_loop() -> None:
    box = Box()
    box.post(Begun(box.task, a_replica()))
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
    mailbox.post([Begun(make_task(), a_replica())])
