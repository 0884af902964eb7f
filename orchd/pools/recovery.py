"""Bringing back a replica that was given up, because its model failed or hung."""

from __future__ import annotations

import logging

from orchd.pools.pool import Pool

_log = logging.getLogger(__name__)

RECOVERY_PAUSE_S = 1.0
MAX_RECOVERY_PAUSE_S = 60.0


async def recover(pool: Pool, index: int) -> None:
    """Load the pool's model on the replica again, after a pause that doubles each time it does not last.

    Event loop thread only. It goes on until the replica has a model, from here or from a reload.
    """
    replica = pool.replicas[index]
    if pool.is_lost(index):
        return  # it still has its model
    if not replica.slots.ready:
        await pool.emptied(replica)  # what it had may still take the memory
    pause_s = min(RECOVERY_PAUSE_S * 2 ** max(0, replica.setbacks - 1), MAX_RECOVERY_PAUSE_S)
    while True:
        await pool.sleep(pause_s)
        if replica.slots.ready:
            return  # a reload was quicker
        if pool.reloading:
            continue
        assert pool.model is not None  # it had one, or no replica could have gone down
        model = pool.model
        try:
            instance = await pool.loader.load_instance(index, model)
        except Exception as error:
            pause_s = min(2 * pause_s, MAX_RECOVERY_PAUSE_S)
            _log.error("pool %s, replica %d is still down: %s; retrying in %g s", pool.id, index, error, pause_s)
            continue
        if pool.reloading or replica.slots.ready or pool.model is not model:
            pool.loader.discard_instances([instance])
            continue
        pool.scheduler.bring_back(replica.slots, instance)
        replica.worker.adopt(replica, instance)
        _log.warning("pool %s, replica %d is alive again", pool.id, index)
        return
