"""What a server is doing, made from two looks at its ``/health`` and ``/metrics``. Pure: no server, no terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from orchd.client import Health
from orchd.schemas import Priority

_SAMPLE: Final = re.compile(r"^(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)
_LABEL: Final = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A replica; figures that the server does not give are None."""

    id: str
    device: str
    alive: bool
    slots: int
    busy: int
    tokens_per_s: float
    gpu_utilization: float | None
    vram_used_bytes: int | None


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A pool, and how many tasks of each priority wait in its queue."""

    id: str
    model_id: str | None
    ready: bool
    waiting: dict[str, int]
    replicas: tuple[ReplicaStatus, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is doing: its pools, and how many submits it has refused."""

    url: str
    status: str
    engine_version: str | None
    rejected: int
    pools: tuple[PoolStatus, ...]


@dataclass(frozen=True)
class Look:
    """What the server said of itself at one time, in monotonic seconds."""

    at: float
    health: Health
    metrics: str


class Samples:
    """The samples of a text in Prometheus's format."""

    def __init__(self, text: str) -> None:
        self._samples = [
            (found["name"], dict(_LABEL.findall(found["labels"])), float(found["value"]))
            for found in _SAMPLE.finditer(text)
        ]

    def values(self, name: str, **labels: str) -> Iterator[float]:
        """Of all samples that have these labels."""
        for found, its, value in self._samples:
            if found == name and labels.items() <= its.items():
                yield value

    def total(self, name: str, **labels: str) -> float:
        """Their sum."""
        return sum(self.values(name, **labels))

    def label(self, name: str) -> str | None:
        """A label's value in the first sample that has it."""
        return next((its[name] for _, its, _ in self._samples if name in its), None)


def status_of(url: str, before: Look, now: Look) -> Status:
    """What the server is doing between two looks."""
    then, samples = Samples(before.metrics), Samples(now.metrics)
    seconds = max(now.at - before.at, 1e-9)

    def replica(pool_id: str, health: Mapping[str, object]) -> ReplicaStatus:
        where = {"pool_id": pool_id, "replica_id": str(health["id"])}
        tokens = samples.total("tokens_out_total", **where) - then.total("tokens_out_total", **where)
        vram = next(samples.values("vram_used_bytes", **where), None)
        return ReplicaStatus(
            **health,  # type: ignore[arg-type]  # the fields of one struct in another
            tokens_per_s=round(max(0.0, tokens) / seconds, 1),
            gpu_utilization=next(samples.values("gpu_utilization", **where), None),
            vram_used_bytes=None if vram is None else int(vram),
        )

    return Status(
        url=url,
        status=now.health.status,
        engine_version=samples.label("engine_version"),
        rejected=int(samples.total("tasks_rejected_total")),
        pools=tuple(
            PoolStatus(
                id=pool.id,
                model_id=pool.model_id,
                ready=pool.ready,
                waiting={
                    priority.value: int(samples.total("queue_depth", pool_id=pool.id, priority=priority.value))
                    for priority in Priority
                },
                replicas=tuple(replica(pool.id, msgspec.structs.asdict(one)) for one in pool.replicas),
            )
            for pool in now.health.pools
        ),
    )
