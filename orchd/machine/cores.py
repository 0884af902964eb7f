"""The processor's cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Physical cores this process may run on: two threads that share a core compute no faster than one.

    Args:
        cpus: Where the kernel tells which threads share a core; where it does not, every thread counts.
    """
    threads = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for thread in threads:
        try:
            cores.add((cpus / f"cpu{thread}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(thread))
    return len(cores)


def crowded_cpus() -> tuple[int, ...]:
    """The CPUs this process may run on, if there is one for each of `usable_cores`; empty if there are more.

    Threads that compute on all of them are best kept where they are. The system would put two of them on one CPU while
    another program has theirs, and each would spin out its time there waiting for the other.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    cpus = sorted(os.sched_getaffinity(0))
    return tuple(cpus) if len(cpus) == usable_cores() else ()
