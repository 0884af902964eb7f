"""What `orchd check` prints of its findings, for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchd.cli.findings import Findings, PoolFindings
from orchd.machine.memory import gib


def show(findings: Findings, out: Console) -> None:
    """Print findings for people."""
    for label, fact in _facts(findings):
        out.print(Text.assemble((f"{label:11}", "dim"), fact), soft_wrap=True)
    for pool in findings.pools:
        out.print()
        for label, fact in _pool_facts(pool):
            out.print(Text.assemble((f"{label:11}", "dim"), fact), soft_wrap=True)
    if findings.memory:
        table = Table("memory", "pools", "needed", "free", "verdict", box=None, pad_edge=False)
        for row in findings.memory:
            verdict = Text("fits", "green") if row.fits else Text("does not fit", "red")
            free = "unknown" if row.free_bytes is None else gib(row.free_bytes)
            table.add_row(row.place, Text(", ".join(row.pools)), gib(row.need_bytes), free, verdict)
        out.print()
        out.print(table)
    out.print()
    for note in findings.notes:
        out.print(Text.assemble(("note: ", "yellow"), note), soft_wrap=True)
    for problem in findings.problems:
        out.print(Text.assemble(("problem: ", "bold red"), problem), soft_wrap=True)
    if findings.ok:
        out.print(Text.assemble(("ok", "bold green"), ": orchd serve can start with this configuration"))


def _facts(findings: Findings) -> Iterator[tuple[str, str]]:
    yield "config", findings.config or "no file; using the defaults"
    yield "listens", findings.listen
    yield "token", findings.token
    yield "llama.cpp", findings.llama_cpp
    if findings.driver is not None:
        yield "driver", findings.driver
    for gpu in findings.gpus:
        free = "unknown" if gpu.free_bytes is None else gib(gpu.free_bytes)
        yield gpu.device, f"{gpu.name}, {free} of {gib(gpu.memory_bytes)} free, {gpu.uuid}"
    if not findings.gpus:
        yield "GPUs", "none"


def _pool_facts(pool: PoolFindings) -> Iterator[tuple[str, str]]:
    yield "pool", pool.id
    yield "  model", pool.model_id or "none usable"
    if pool.path is not None:
        yield "  file", pool.path
    yield "  devices", ", ".join(pool.devices) or "none usable"
    yield "  shape", f"{'1 slot' if pool.slots == 1 else f'{pool.slots} slots'} of {pool.ctx} tokens per replica"
    if pool.weights_bytes is not None and pool.cache_bytes is not None and pool.buffers_bytes is not None:
        weights, cache, buffers = map(gib, (pool.weights_bytes, pool.cache_bytes, pool.buffers_bytes))
        each = f"weights {weights}, KV cache {cache}, buffers {buffers} per replica"
        yield "  needs", f"{each}; prompt cache {gib(pool.prompt_cache_bytes)}" if pool.prompt_cache_bytes else each
