"""A prompt is tokenised for the model that its pool serves when it is queued, also where a reload comes between."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import pytest

from engines.api import NO_ARGUMENTS, Footprint, Prompt, TemplateArgument, Vocab
from engines.errors import EngineDead
from orchd.errors import InvalidParams, PoolUnavailable
from orchd.models.active_model import INLINE_CHARS, LONG_CHARS, TEMPLATE_THREADS, ActiveModel
from orchd.pools import admission
from orchd.pools.pool import Pool
from orchd.schemas import Message, TaskRequest
from orchd.settings.config import PoolConfig
from testkit.harness import until


class Tokenizer:
    """Every prompt is one token; something may happen before it answers."""

    def __init__(self, token: int, before: Callable[[], None] = lambda: None) -> None:
        self.token = token
        self.before = before

    def tokenize(self, text: str, *, at_most: int | None = None) -> list[int]:
        self.before()
        return [self.token]


class Serving:
    """As much of a pool as admission looks at."""

    id = "default"
    config = PoolConfig(ctx=512)

    def __init__(self, model: ActiveModel) -> None:
        self.model = model
        self.takes_tasks = asyncio.Event()
        self.takes_tasks.set()


def model(name: str, vocab: Tokenizer) -> ActiveModel:
    return ActiveModel(name, Path(f"{name}.gguf"), cast(Vocab, vocab), footprint=Footprint(0, 0, 0), fingerprint=())


def reloaded_while_tokenising(error: Exception | None) -> Pool:
    pool = Serving(new := model("new", Tokenizer(2)))

    def replace() -> None:
        pool.model = new
        if error is not None:
            raise error

    pool.model = model("old", Tokenizer(1, replace))
    return cast(Pool, pool)


@pytest.mark.parametrize("error", [None, EngineDead("the vocabulary is closed")])
@pytest.mark.parametrize("chars", [1, INLINE_CHARS + 1])
async def test_a_reload_that_comes_between_tokenises_again(error: Exception | None, chars: int) -> None:
    task = await admission.prepare(reloaded_while_tokenising(error), TaskRequest(prompt="x" * chars))
    assert list(task.tokens) == [2]


async def test_a_reload_that_comes_between_may_take_away_the_model_that_was_asked_for() -> None:
    with pytest.raises(PoolUnavailable, match="asked for 'old', but its pool now serves 'new'"):
        await admission.prepare(reloaded_while_tokenising(None), TaskRequest(prompt="x", model_ref="old"))


async def test_a_closed_vocabulary_that_nobody_replaced_is_an_error() -> None:
    def fail() -> None:
        raise EngineDead("the vocabulary is closed")

    with pytest.raises(EngineDead):
        await admission.prepare(cast(Pool, Serving(model("only", Tokenizer(1, fail)))), TaskRequest(prompt="x"))


class Threads(Tokenizer):
    """Notes on which thread it is asked, and by how many at once."""

    def __init__(self) -> None:
        super().__init__(1)
        self.seen: list[str] = []
        self.at_once = self.most_at_once = 0
        self.go_on = threading.Event()

    def tokenize(self, text: str, *, at_most: int | None = None) -> list[int]:
        self.seen.append(threading.current_thread().name)
        if len(text) > LONG_CHARS:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            assert self.go_on.wait(20)
            self.at_once -= 1
        return [1]

    def tokenize_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        arguments: Mapping[str, TemplateArgument] = NO_ARGUMENTS,
        at_most: int | None = None,
    ) -> Prompt:
        if messages[0]["content"] == "slow":
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            assert self.go_on.wait(20)
            self.at_once -= 1
        return Prompt(self.tokenize(""), reply="")


MESSAGE = Message(role="user", content="")


@pytest.mark.parametrize(
    ("request_", "inline"),
    [
        (TaskRequest(prompt="x" * INLINE_CHARS), True),
        (TaskRequest(prompt="x" * (INLINE_CHARS + 1)), False),
        (TaskRequest(messages=(MESSAGE,)), False),
        (TaskRequest(messages=(MESSAGE,) * 500), False),
    ],
    ids=["short prompt", "long prompt", "one empty message", "many empty messages"],
)
async def test_only_short_prompts_are_tokenised_on_the_event_loop(request_: TaskRequest, inline: bool) -> None:
    vocab = Threads()
    await admission.prepare(cast(Pool, Serving(model("only", vocab))), request_)
    assert (vocab.seen == [threading.current_thread().name]) is inline


async def test_more_messages_than_a_slot_has_tokens_are_not_given_to_a_template() -> None:
    pool = cast(Pool, Serving(model("only", cast(Tokenizer, None))))
    with pytest.raises(InvalidParams, match="the 513 messages do not fit into a slot's context of 512 tokens"):
        await admission.prepare(pool, TaskRequest(messages=(MESSAGE,) * 513))


async def test_very_long_prompts_take_turns_and_others_pass_them() -> None:
    vocab = Threads()
    pool = cast(Pool, Serving(model("only", vocab)))
    long = [asyncio.create_task(admission.prepare(pool, TaskRequest(prompt="x" * 100_000))) for _ in range(50)]
    await until(lambda: vocab.at_once, "one is tokenised")
    await asyncio.wait_for(admission.prepare(pool, TaskRequest(prompt="x" * 10_000)), 20)
    vocab.go_on.set()
    await asyncio.gather(*long)
    assert vocab.most_at_once == 1


async def test_slow_templates_have_few_threads_of_their_own() -> None:
    """However many conversations there are, nothing else waits for their templates."""
    vocab = Threads()
    pool = cast(Pool, Serving(model("only", vocab)))
    slow = TaskRequest(messages=(Message(role="user", content="slow"),))
    waiting = [asyncio.create_task(admission.prepare(pool, slow)) for _ in range(50)]
    await until(lambda: vocab.at_once == TEMPLATE_THREADS, "as many as may be are rendered")
    await asyncio.wait_for(admission.prepare(pool, TaskRequest(prompt="x" * 10_000)), 20)
    await asyncio.wait_for(asyncio.to_thread(len, ""), 20)
    vocab.go_on.set()
    await asyncio.gather(*waiting)
    assert vocab.most_at_once == TEMPLATE_THREADS
