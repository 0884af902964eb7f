"""Which pool a request goes to, and what becomes of it before it may wait: everything that can refuse it."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from engines.errors import EngineDead
from orchd.errors import UNREADY_RETRY_S, InvalidParams, PoolUnavailable, PoolUnready
from orchd.pools.pool import Pool, PoolState
from orchd.queue.tasks import Task
from orchd.schemas import TaskRequest

_MAX_NAME_CHARS = 64


def check_input(request: TaskRequest) -> None:
    """Refuse a request that says two things at once, or nothing. Raises `InvalidParams`."""
    if (request.prompt is None) == (request.messages is None):
        raise InvalidParams("prompt, messages: exactly one of the two is required")
    if request.chat_template_kwargs is None:
        return
    if request.messages is None:
        raise InvalidParams(
            "chat_template_kwargs: a prompt goes through no chat template; send messages, or leave it out"
        )
    for name in request.chat_template_kwargs:
        if not name.isidentifier() or len(name) > _MAX_NAME_CHARS:
            raise InvalidParams(
                f"chat_template_kwargs: {name[:_MAX_NAME_CHARS]!r} cannot be the name of a variable; use letters, "
                f"digits and _, at most {_MAX_NAME_CHARS}"
            )


def choose_pool(pools: Mapping[str, Pool], request: TaskRequest) -> Pool:
    """The pool that a request names, by ``pool_id``, by ``model_ref`` or because there is only one.

    Raises:
        InvalidParams: It names a pool that is not there, or none where there are several.
        PoolUnavailable: No pool serves ``model_ref``, or none of the pool's replicas is alive.
        PoolUnready: The pool, or one that may come to serve ``model_ref``, is loading its first model.
    """
    chosen = list(pools.values())
    if request.pool_id is not None:
        if request.pool_id not in pools:
            raise InvalidParams(f"pool_id: there is no pool {request.pool_id!r}; available: {', '.join(pools)}")
        chosen = [pools[request.pool_id]]
    elif request.model_ref is None and len(chosen) > 1:
        raise InvalidParams(f"pool_id is required, because there are several pools; available: {', '.join(pools)}")
    if request.model_ref is not None:
        named = [pool for pool in chosen if pool.model is not None and pool.model.is_named(request.model_ref)]
        chosen = named or [pool for pool in chosen if pool.state is PoolState.LOADING]
        if not chosen:
            raise PoolUnavailable(
                f"no pool serves {request.model_ref!r} now; served: {_served(pools)}",
                retry_after_s=UNREADY_RETRY_S,
            )
    pool = chosen[0]
    if len(chosen) > 1:
        pool = min(chosen, key=lambda pool: (not pool.ready, sum(pool.scheduler.depth().values())))
    check_open(pool)
    return pool


def _served(pools: Mapping[str, Pool]) -> str:
    return ", ".join(dict.fromkeys(pool.model.id for pool in pools.values() if pool.model is not None)) or "none"


def check_open(pool: Pool) -> None:
    """Refuse what a pool cannot take now.

    Raises:
        PoolUnready: It is loading its first model.
        PoolUnavailable: Its model could not be loaded, or none of its replicas is alive.
    """
    if pool.state is PoolState.LOADING:
        raise PoolUnready(f"pool {pool.id} is still loading its model; try again", retry_after_s=UNREADY_RETRY_S)
    if pool.state is PoolState.FAILED:
        raise PoolUnavailable(
            f"pool {pool.id} has no model ({pool.failure}); reload the pool once the file is fixed",
            retry_after_s=UNREADY_RETRY_S,
        )
    if pool.stranded:
        raise PoolUnavailable(
            f"no replica of pool {pool.id} is alive; they are being restarted, try again", retry_after_s=UNREADY_RETRY_S
        )


async def prepare(pool: Pool, request: TaskRequest) -> Task:
    """A task with its prompt in the tokens of the model that the pool serves when this returns.

    Raises:
        InvalidParams: The model refuses the prompt, or it does not fit.
        PoolUnavailable: A reload meanwhile took away the model it asked for.
    """
    task_id = str(request.task_id or uuid.uuid4())
    while True:
        model = pool.model
        assert model is not None  # `check_open` saw to it
        model.check_ref(request)
        try:
            prompt = await model.tokenize_aside(request, ctx=pool.config.ctx)
        except EngineDead:
            if pool.model is model:
                raise
            continue  # a reload closed the vocabulary meanwhile
        await pool.takes_tasks.wait()
        if pool.model is model:
            return Task(task_id, request, pool.id, prompt)
