"""What `orchd check` finds, as its JSON says it."""

from __future__ import annotations

import msgspec


class GpuFindings(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU that this process may use."""

    device: str
    uuid: str
    name: str
    memory_bytes: int
    free_bytes: int | None


class PoolFindings(msgspec.Struct, frozen=True, kw_only=True):
    """One pool: what it would hold, and where."""

    id: str
    model_id: str | None
    path: str | None
    devices: tuple[str, ...]
    slots: int
    ctx: int
    weights_bytes: int | None = None
    cache_bytes: int | None = None
    buffers_bytes: int | None = None
    prompt_cache_bytes: int = 0


class MemoryFindings(msgspec.Struct, frozen=True, kw_only=True):
    """One memory that pools share: a GPU's, or the machine's (``cpu``)."""

    place: str
    pools: tuple[str, ...]
    need_bytes: int
    free_bytes: int | None
    fits: bool


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `orchd check` found."""

    ok: bool
    config: str | None
    listen: str
    token: str
    llama_cpp: str
    driver: str | None
    gpus: tuple[GpuFindings, ...]
    pools: tuple[PoolFindings, ...]
    memory: tuple[MemoryFindings, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
