"""The table's rows: what each is started with, what it is compared with, and what is to be reached."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from benchmarks.compare import conversations, editing, workloads
from benchmarks.compare.servers import Running
from benchmarks.compare.stats import Metrics, Target
from benchmarks.compare.workloads import Work

Peer = str
"""A server's name: ``llama-server``, also with a kind of guesses, ``llama_cpp.server``, or one of `OWN`."""
WITHOUT_GUESSES: Final = "orchd without guesses"
DETERMINISTIC: Final = "orchd deterministic"
"""Only where it is asked for: what it costs is no target."""
OWN: Final = {WITHOUT_GUESSES: "speculate = false\n", DETERMINISTIC: "deterministic = true\n"}
"""Servers of ours to compare with: the line in their pool's configuration."""
GUESSING: Final = tuple(
    f"llama-server {kind}" for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-cache", "ngram-mod")
)
Use = Literal["real", "tiny"]


@dataclass(frozen=True)
class Shape:
    """What a server is started with.

    Attributes:
        use: ``tiny`` is the generated model, with which only the serving path counts.
        prompt_store: See `drivers.Setup`.
    """

    slots: int
    ctx: int
    use: Use = "real"
    prompt_store: bool = True


Run = Callable[[Running, Work], Awaitable[Metrics]]


@dataclass(frozen=True)
class Scenario:
    """One row of the table."""

    name: str
    about: str
    shape: Shape
    run: Run
    targets: tuple[Target, ...] = ()
    peers: tuple[Peer, ...] = ("llama-server",)
    in_quick: bool = True


_REAL = Shape(slots=8, ctx=2048)
_FOUR = Shape(slots=4, ctx=2048)
_LONG = Shape(slots=4, ctx=8192)
_TINY = Shape(slots=16, ctx=512, use="tiny")
_BOTH: Final[tuple[Peer, ...]] = ("llama-server", "llama_cpp.server")


_ALL: Final = ("llama-server", WITHOUT_GUESSES, *GUESSING)


def _than(peer: Peer, bound: float, model: str = "") -> Target:
    return Target("tokens_per_s", "at least", bound, peer=peer, model=model)


def _than_own(bound: float, model: str = "") -> Target:
    return _than(WITHOUT_GUESSES, bound, model)


def _rate(bound: float) -> tuple[Target, ...]:
    return (_than("llama-server", bound),)


_DECODING: Final = (*_rate(1.0), _than_own(0.99))

SCENARIOS: Final = (
    Scenario(
        "decode-1",
        "1 client",
        _REAL,
        functools.partial(workloads.decode, clients=1),
        _DECODING,
        (*_BOTH, WITHOUT_GUESSES, DETERMINISTIC),
    ),
    Scenario(
        "decode-4",
        "4 clients, unrelated prompts",
        _REAL,
        functools.partial(workloads.decode, clients=4),
        _DECODING,
        ("llama-server", WITHOUT_GUESSES, DETERMINISTIC),
    ),
    Scenario(
        "decode-8",
        "8 clients, unrelated prompts",
        _REAL,
        functools.partial(workloads.decode, clients=8),
        _DECODING,
        ("llama-server", WITHOUT_GUESSES, DETERMINISTIC),
    ),
    *(
        Scenario(
            f"json-{clients}",
            f"{clients} client{'s' * (clients > 1)}, JSON by schema",
            _REAL,
            functools.partial(workloads.json_by_schema, clients=clients),
            (*_rate(1.5), Target("of_free", "at least", 0.95, of="value")),
        )
        for clients in (1, 8)
    ),
    Scenario(
        "edit-1",
        "a text of 400 tokens given back with changes, 1 client",
        _REAL,
        functools.partial(editing.edit, clients=1),
        (_than_own(1.9, "Q4_0"), _than_own(1.4, "Q4_1"), *(_than(peer, 1.15) for peer in GUESSING)),
        _ALL,
    ),
    Scenario(
        "edit-4",
        "the same, 4 clients",
        _REAL,
        functools.partial(editing.edit, clients=4),
        (_than_own(1.1),),
        _ALL,
    ),
    Scenario("extract-1", "fields from a document as JSON, 1 client", _REAL, editing.extract, (), _ALL),
    Scenario("poisson", "Poisson arrivals, 1.5 a second", _REAL, workloads.poisson, in_quick=False),
    Scenario(
        "long-prompt",
        "a 1,000-token prompt every 4 s beside 4 streams",
        _REAL,
        workloads.long_prompt,
        (
            Target("itl_max_ms", "at most", 0.08),
            Target("long_ttft_p50_ms", "at most", 1.3),
            Target("tokens_per_s", "at least", 0.97),
        ),
    ),
    Scenario(
        "shared-prefix",
        "8 clients, a common prefix of 500 tokens, cold",
        _REAL,
        workloads.shared_prefix,
        (Target("ttft_p99_ms", "at most", 0.3), Target("requests_per_s", "at least", 2.0)),
    ),
    *(
        Scenario(
            f"conversations-{count}",
            f"{count} conversations on 4 slots, turns 2 to 4",
            _FOUR,
            functools.partial(conversations.conversations, count=count),
            (Target("ttft_p50_ms", "at most", 0.9), Target("ttft_p99_ms", "at most", 1.0)),
            ("llama-server", DETERMINISTIC),
        )
        for count in (3, 12)
    ),
    Scenario(
        "agent",
        "a prompt that grows to 6,000 tokens beside 2 streams",
        _LONG,
        conversations.agent,
        (
            Target("ttft_p50_ms", "at most", 0.9),
            Target("ttft_p99_ms", "at most", 1.0),
            Target("itl_max_ms", "at most", 0.3),
        ),
    ),
    Scenario(
        "short-behind-long",
        "16 tokens, 0.3 s after a prompt of 5,000",
        _LONG,
        conversations.short_behind_long,
        (Target("ttft_p50_ms", "at most", 0.1),),
    ),
    Scenario(
        "interactive-beside-batch",
        "a 1,000-token prompt beside 3 batch streams",
        _LONG,
        conversations.interactive_beside_batch,
        (Target("ttft_p50_ms", "at most", 1.05),),
    ),
    Scenario(
        "memory",
        "8 slots of 2,048 tokens, after work",
        replace(_REAL, prompt_store=False),
        workloads.memory,
        (Target("rss_mib", "at most", 1.15), Target("idle_cpu_percent", "at most", 0.5, of="value")),
    ),
    Scenario("path-1", "tiny model, 1 client", _TINY, functools.partial(workloads.path, clients=1), _rate(1.5), _BOTH),
    Scenario("path-16", "tiny model, 16 clients", _TINY, functools.partial(workloads.path, clients=16), _rate(3.0)),
)

SWEEP: Final = "slots-sweep"
SWEEP_SLOTS: Final = (1, 2, 4, 8, 16, 32, 64)


def rows(names: set[str], *, quick: bool, use: Use, peers: Collection[Peer] = ()) -> Iterator[tuple[Scenario, Peer]]:
    """What is measured with such a model beside which peer, of these if any are named, in the order of the table."""
    for scenario in SCENARIOS:
        if scenario.name in names and scenario.shape.use == use and (scenario.in_quick or not quick):
            beside = [peer for peer in scenario.peers if (peer in peers if peers else peer != DETERMINISTIC)]
            yield from ((scenario, peer) for peer in beside[: 1 if quick else None])
