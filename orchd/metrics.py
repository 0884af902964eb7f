"""Snapshots to Prometheus: the closed list of series, and nothing else. The only importer of prometheus_client."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchd.errors import Code
from orchd.machine.telemetry import Telemetry
from orchd.models.registry import ModelState
from orchd.schemas import ENGINE, Priority
from orchd.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REJECTIONS = (
    Code.INVALID_PARAMS,
    Code.ADMISSION_REJECT,
    Code.POOL_UNREADY,
    Code.POOL_UNAVAILABLE,
    Code.INTERNAL,
)
"""Every value of ``tasks_rejected_total``'s ``reason``."""

_POOL = ["engine", "engine_version", "pool_id"]
_REPLICA = [*_POOL, "replica_id"]
_DEVICE = [*_REPLICA, "device"]


class Metrics:
    """Renders a service's state. Event loop thread only.

    Args:
        service: Its state is rendered.
        engine_version: Value of the label of that name.
        telemetry: The latest readings of the GPUs; the driver is not asked here. None if there are no GPUs.
    """

    def __init__(self, service: Service, engine_version: str, telemetry: Telemetry | None = None) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_ServiceCollector(service, engine_version, telemetry))

    def render(self) -> bytes:
        """The text exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class _ServiceCollector(Collector):
    def __init__(self, service: Service, engine_version: str, telemetry: Telemetry | None) -> None:
        self._service = service
        self._version = engine_version
        self._telemetry = telemetry

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily("queue_depth", "Tasks waiting in the pool's queue.", labels=[*_POOL, "priority"])
        enqueued = CounterMetricFamily(
            "tasks_enqueued",
            "Accepted tasks that left the queue, by the replica that took them; no replica for those that ended in it.",
            labels=[*_REPLICA, "priority"],
        )
        tokens_in = CounterMetricFamily("tokens_in", "Prompt tokens of started tasks.", labels=_REPLICA)
        tokens_out = CounterMetricFamily("tokens_out", "Output tokens.", labels=_REPLICA)
        for pool in self._service.pools.values():
            of_pool = [ENGINE, self._version, pool.id]
            for priority, waiting in pool.scheduler.depth().items():
                depth.add_metric([*of_pool, priority.value], waiting)
            for priority in Priority:
                enqueued.add_metric([*of_pool, "", priority.value], pool.scheduler.dropped[priority])
            for replica in pool.replicas:
                of_replica = [*of_pool, replica.id]
                for priority in Priority:
                    enqueued.add_metric([*of_replica, priority.value], replica.slots.enqueued[priority])
                tokens_in.add_metric(of_replica, replica.tokens_in)
                tokens_out.add_metric(of_replica, replica.tokens_out)

        rejected = CounterMetricFamily(
            "tasks_rejected", "Rejected submits, by error code.", labels=["engine", "reason"]
        )
        for code in REJECTIONS:
            rejected.add_metric([ENGINE, code.value], self._service.rejected[code.value])

        states = GaugeMetricFamily(
            "model_state", "1 for the state a model is in, 0 for the other.", labels=["model_id", "state"]
        )
        for model_id, state in self._service.models.states().items():
            for value in ModelState:
                states.add_metric([model_id, value.value], float(value is state))

        yield from (depth, enqueued, rejected, tokens_in, tokens_out, *self._gpus(), states)

    def _gpus(self) -> Iterator[Metric]:
        """A GPU that cannot be asked has no samples in either: what its replica holds there is not known then."""
        utilization = GaugeMetricFamily(
            "gpu_utilization",
            "Share of recent time in which the replica's GPU was computing, for any process, from 0 to 1 (NVML).",
            labels=_DEVICE,
        )
        used = GaugeMetricFamily(
            "vram_used_bytes",
            "Bytes of the GPU's memory that the replica's models hold: weights, KV cache and compute buffers as "
            "llama.cpp reports them, during a reload those of both models. CUDA's own memory for the process, a few "
            "hundred MiB, is not included.",
            labels=_DEVICE,
        )
        for pool in self._service.pools.values():
            for replica in pool.replicas:
                reading = self._telemetry.reading(replica.device) if self._telemetry is not None else None
                if reading is None:
                    continue
                labels = [ENGINE, self._version, pool.id, replica.id, replica.device]
                used.add_metric(labels, replica.device_bytes)
                if reading.utilization is not None:
                    utilization.add_metric(labels, reading.utilization)
        yield from (utilization, used)
