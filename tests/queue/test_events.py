"""A task's log of events, and who is told of them."""

from __future__ import annotations

import asyncio

import pytest

from engines.api import FinishReason
from orchd.queue.events import EventLog
from orchd.schemas import End, Started, Token

STARTED = Started(queue_position=0, predicted_start_ms=0)
END = End(tokens_in=1, tokens_cached=0, tokens_out=0, decode_ms=0, finish_reason=FinishReason.STOP)


@pytest.mark.parametrize("event", [STARTED, Token(t="x", i=0), END])
def test_nothing_follows_an_end(event: Started | Token | End) -> None:
    log = EventLog()
    log.append(END)
    assert log.ended
    with pytest.raises(RuntimeError, match=r"^an event after the end of its task$"):
        log.append(event)
    assert len(log.frames) == 1


async def test_every_subscriber_is_told_once_of_all_that_came_together() -> None:
    log = EventLog()
    told: list[int] = []
    with log.subscribed(lambda: told.append(len(log.frames))), log.subscribed(lambda: told.append(-1)):
        log.append(STARTED)
        log.append(Token(t="x", i=0))
        assert told == [], "events that one callback adds are told together, after it"
        await asyncio.sleep(0)
        assert told == [2, -1]
        log.append(END)
        await asyncio.sleep(0)
        assert told == [2, -1, 3, -1]


async def test_who_has_left_is_not_told() -> None:
    log = EventLog()
    told: list[int] = []
    with log.subscribed(lambda: told.append(1)):
        log.append(STARTED)
    await asyncio.sleep(0)
    assert told == []
