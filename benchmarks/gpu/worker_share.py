"""How much of a round the worker's thread spends outside ``llama_decode``: with every slot busy, the GPU waits so long.

    python -m benchmarks.gpu.worker_share MODEL [--device gpu:0] [--slots 32] [--steps 200]

A real worker with a real model, its rounds made by hand: no event loop, no sockets. What is timed is `Worker.round`
(commands, filling slots, planning, sampling, text, reports), and in it the call that runs the model and waits for it.
"""

from __future__ import annotations

import argparse
import array
import itertools
import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from engines.api import DeviceSpec, ModelSpec, Prompt
from orchd.machine.cores import usable_cores
from orchd.machine.devices import gpu_index
from orchd.machine.gpus import find_gpus
from orchd.pools.replica import Instance, Replica
from orchd.pools.reports import Report
from orchd.pools.worker import Worker
from orchd.queue.scheduler import Scheduler
from orchd.queue.slots import ReplicaSlots
from orchd.queue.tasks import Task
from orchd.schemas import TaskRequest

PROMPT_TOKENS = 32
WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Share:
    """The mean over the measured rounds.

    Attributes:
        step_s: A round.
        decode_s: ``llama_decode`` in it, and waiting for the device.
        slots: Sequences that were decoded at the same time.
    """

    step_s: float
    decode_s: float
    slots: int

    @property
    def outside(self) -> float:
        """Share of the round in which the device had nothing to do."""
        return 1 - self.decode_s / self.step_s


def spec_of(device: str, threads: int = 1) -> DeviceSpec:
    """A device of this machine in a process that sees them all; a CPU computes with so many threads."""
    index = gpu_index(device)
    if index is None:
        return DeviceSpec("cpu", threads=threads)
    return DeviceSpec("gpu", index, pci=next((gpu.pci for gpu in find_gpus() if gpu.index == index), ""))


def share_outside_decode(model: Path, device: str, *, slots: int, steps: int) -> Share:
    """Measure it; every sequence samples as a task does by default, because greedy ones cost less.

    Args:
        model: A GGUF file.
        device: ``gpu:N`` or ``cpu``.
        slots: Sequences.
        steps: Rounds to measure, after a few that are not.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts
    from engines.llamacpp.engine import LlamaCppEngine  # loads CUDA, which looks at that once

    engine = LlamaCppEngine()
    tokens = WARM_UP_STEPS + steps + 64
    ctx = -(-(PROMPT_TOKENS + tokens) // 256) * 256
    loaded = engine.load(ModelSpec(model, slots=slots, ctx=ctx), spec_of(device, usable_cores()))
    decode, decoded = loaded._context.decode, [0.0]

    def timed(n_rows: int) -> None:
        began = time.perf_counter()
        decode(n_rows)
        decoded[0] += time.perf_counter() - began

    loaded._context.decode = timed  # type: ignore[method-assign]  # to time it from outside
    reports: list[list[Report]] = []
    worker = Worker(device, clock=time.monotonic)
    worker._post = reports.append  # no thread: rounds are made here
    own = ReplicaSlots[Instance](0, slots, wake=worker.wake)
    scheduler = Scheduler(slots, [own], clock=time.monotonic)
    replica, instance = Replica("0", device, own, scheduler, worker), Instance(loaded)
    worker.replicas.append(replica)
    scheduler.switch([instance], {})
    worker.adopt(replica, instance)
    for number in range(slots):
        request = TaskRequest(prompt="any", max_tokens=tokens, ignore_eos=True)
        prompt = array.array("i", itertools.islice(itertools.cycle(range(100 + number, 250)), PROMPT_TOKENS))
        with scheduler.reservation(request.priority):
            scheduler.submit(Task(str(uuid.UUID(int=number)), request, "default", Prompt(prompt)))
    for _ in range(WARM_UP_STEPS):
        worker.round()
    decoded[0] = 0.0
    began = time.perf_counter()
    for _ in range(steps):
        worker.round()
    seconds = time.perf_counter() - began
    busy = own.busy
    loaded.close()
    if busy != slots:
        raise RuntimeError(f"only {busy} of {slots} sequences were still running at the end")
    return Share(seconds / steps, decoded[0] / steps, slots)


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description="Time of a worker's round outside llama_decode.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="gpu:0")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", action="store_true", help="print an object for a program")
    options = parser.parse_args()
    share = share_outside_decode(options.model, options.device, slots=options.slots, steps=options.steps)
    if options.json:
        print(json.dumps({**vars(share), "outside": share.outside}))
        return
    print(
        f"{options.model.name} on {options.device}, {share.slots} slots: round {share.step_s * 1e3:.2f} ms, "
        f"llama_decode {share.decode_s * 1e3:.2f} ms, outside {share.outside:.1%}"
    )


if __name__ == "__main__":
    main()
