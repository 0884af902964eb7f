"""What the owner may set.

The structs are the reference: types, ranges and descriptions are read from them for error sentences, for the
documentation and for the JSON schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from orchd.settings.strict import Strict

DAY_S = 86_400

_IPV6 = r"[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]*"
_PORT = r"(:[0-9]{1,5})?"
HOST_NAME = rf"^({_IPV6}|(\[{_IPV6}\]|[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?){_PORT})$"
HostName = Annotated[str, Meta(pattern=HOST_NAME, examples=["orchd.lan", "fd00::1"])]
ORIGIN = rf"^(null|file://|[A-Za-z][A-Za-z0-9+.-]*://(\[{_IPV6}\]|[A-Za-z0-9._~-]+){_PORT})$"
Origin = Annotated[str, Meta(pattern=ORIGIN, examples=["http://localhost:3000", "tauri://localhost", "null"])]
Folder = Annotated[str, Meta(min_length=1, examples=["~/models"])]
File = Annotated[str, Meta(min_length=1, examples=["~/models/llama.gguf"])]
DEVICE = r"^(cpu|gpu:([0-9]{1,3}|((GPU|MIG)-)?[0-9A-Fa-f-]{4,36}))$"
Device = Annotated[str, Meta(pattern=DEVICE)]
DEVICES = '"auto" or a list such as ["gpu:0", "gpu:1"], ["gpu:GPU-8f5e"] or ["cpu"]'
POOL_ID = "1 to 64 letters, digits, dots, underscores or hyphens"
PoolId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$", extra={"expected": POOL_ID})]
CacheType = Literal["f16", "q8_0", "q4_0", "f32", "bf16"]


class ServerConfig(Strict, frozen=True):
    """Where it listens, who gets in, and its limits."""

    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="TCP port; 0 picks a free one.")] = 8737
    token: Annotated[str | None, Meta(description="The token that every request must carry.")] = None
    token_file: Annotated[str | None, Meta(description="File that contains the token, mode 0600.")] = None
    allowed_hosts: Annotated[
        tuple[HostName, ...],
        Meta(
            description="Hosts, besides the loopback names, that requests may be addressed to, on any port; "
            "browsers write a name that is not ASCII as `xn--…`."
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[Origin, ...] | None,
        Meta(
            description="Browser origins that may use the API; by default loopback origins on any port. "
            "`null` is every local file and every sandboxed page."
        ),
    ] = None
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30, description="Largest request body, in bytes.")] = 1 << 20
    shutdown_grace_s: Annotated[
        float, Meta(ge=0, le=DAY_S, description="Seconds that running tasks have to finish at shutdown.")
    ] = 30.0

    def __repr__(self) -> str:
        """Every field, the token as ``***``."""
        return f"ServerConfig({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Fields for `rich`, which would otherwise print the token in a traceback's locals."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__}
        return list((shown if self.token is None else shown | {"token": "***"}).items())


class QueueConfig(Strict, frozen=True):
    """The bounded queue of each pool."""

    capacity: Annotated[int, Meta(ge=1, le=1_000_000, description="Tasks that may wait in each pool's queue.")] = 64


class TasksConfig(Strict, frozen=True):
    """How long tasks are kept."""

    retention_s: Annotated[
        float, Meta(ge=0, le=30 * DAY_S, description="Seconds that a task's events are kept after its end.")
    ] = 300.0
    retained_bytes: Annotated[
        int,
        Meta(ge=0, le=1 << 40, description="Bytes of memory that all ended tasks together may take."),
    ] = 64 << 20
    cancel_grace_s: Annotated[
        float, Meta(ge=0, le=DAY_S, description="Seconds without a listener after which a task is cancelled.")
    ] = 5.0


class WorkersConfig(Strict, frozen=True):
    """The compute threads, one for each device."""

    stall_s: Annotated[
        float,
        Meta(
            gt=0,
            le=DAY_S,
            description="Seconds without progress after which a busy worker counts as not alive; the target of every "
            "step is at most a twentieth of this.",
        ),
    ] = 60.0
    step_target_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=60_000,
            description="Target for the longest step while a task is streaming, in milliseconds; limits prefill.",
        ),
    ] = 120


class ModelsConfig(Strict, frozen=True):
    """Which files a reload over HTTP may use."""

    roots: Annotated[tuple[Folder, ...], Meta(description="Folders whose models a reload may use.")] = ()


class PoolConfig(Strict, frozen=True):
    """One model, a replica of it on each device, one queue before them."""

    id: Annotated[PoolId, Meta(description="The pool's name in requests and metrics.")] = "default"
    model: Annotated[
        File | None,
        Meta(
            description="A GGUF file: its path, relative to this file's folder, or its name in the roots; `demo` is "
            "the demo model."
        ),
    ] = None
    devices: Annotated[
        Literal["auto"] | Annotated[tuple[Device, ...], Meta(min_length=1)],
        Meta(
            description="One replica on each of these; `auto` is every GPU, or the CPU if there is none.",
            extra={"expected": DEVICES},
        ),
    ] = "auto"
    slots: Annotated[int, Meta(ge=1, le=256, description="Tasks that run at the same time on each replica.")] = 4
    ctx: Annotated[int, Meta(ge=16, le=1 << 24, description="Tokens per slot, prompt and output together.")] = 4096
    batch: Annotated[int, Meta(ge=1, le=65536, description="Maximum number of tokens in one step.")] = 512
    threads: Annotated[
        int, Meta(ge=0, le=1024, description="Threads per replica; 0 divides the machine's cores evenly.")
    ] = 0
    flash_attn: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="Flash attention. On a CPU, a model with small heads can be faster without it once slots hold "
            "a thousand tokens."
        ),
    ] = "auto"
    cache_type_k: Annotated[CacheType, Meta(description="Data type of the K cache.")] = "f16"
    cache_type_v: Annotated[
        CacheType, Meta(description="Data type of the V cache; a quantised type needs flash attention.")
    ] = "f16"
    reload: Annotated[
        Literal["auto", "replace"],
        Meta(
            description='"auto" loads the new model while the old one still serves if memory allows, '
            '"replace" always frees the old one first.'
        ),
    ] = "auto"
    swa_full: Annotated[
        bool,
        Meta(
            description="Keep the whole cache of sliding-window layers: any prefix can be reused then, for several "
            "times the memory. Off, a prompt is reused if it continues an earlier one."
        ),
    ] = False
    prompt_cache_mib: Annotated[
        int,
        Meta(
            ge=0,
            le=1 << 20,
            description="Host memory, in MiB, for prompts that have left their slot, so that a conversation that comes "
            "back is not computed again; divided among the replicas. 0 turns it off.",
        ),
    ] = 1024
    speculate: Annotated[
        bool,
        Meta(
            description="Guess from a task's own text what comes next, and check several tokens at once, whenever that "
            "is measured to be faster. It does not change what is written."
        ),
    ] = True
    deterministic: Annotated[
        bool,
        Meta(
            description="The same request with the same seed gives the same text, whatever else runs or ran before: "
            "each step has one task, and nothing is guessed, reused or kept in the prompt cache. It takes much longer."
        ),
    ] = False
    mmap: Annotated[bool, Meta(description="Map the model file instead of reading it into memory.")] = True

    def __post_init__(self) -> None:
        """What `deterministic` turns off is off, for whoever asks how much memory it takes."""
        if self.deterministic:
            msgspec.structs.force_setattr(self, "prompt_cache_mib", 0)
            msgspec.structs.force_setattr(self, "speculate", False)


class ConfigFile(Strict, frozen=True):
    """Everything a configuration file may hold."""

    server: ServerConfig = ServerConfig()
    queue: QueueConfig = QueueConfig()
    tasks: TasksConfig = TasksConfig()
    workers: WorkersConfig = WorkersConfig()
    models: ModelsConfig = ModelsConfig()
    pools: Annotated[
        tuple[PoolConfig, ...],
        Meta(min_length=1, extra={"expected": "one or more tables, each begun by [[pools]]"}),
    ] = (PoolConfig(),)


class Config(ConfigFile, frozen=True):
    """The settings in force. A pool whose ``model`` is None serves the demo model; paths are absolute."""

    source: Path | None = None
    """The file it was read from."""
