"""Scenarios in which most of what is written has been read: a text given back with changes, fields from a document.

The prompts are raw and hold examples, because the demo model follows no instruction; its copy is begun for it.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Final

from benchmarks.compare import load
from benchmarks.compare.drivers import GREEDY, SAMPLING
from benchmarks.compare.stats import Metrics, Sample, summarise

if TYPE_CHECKING:
    from benchmarks.compare.servers import Running
    from benchmarks.compare.workloads import Work

_TEXT: Final = (
    "The river rose in the spring of 1893 and carried the old bridge away. For eleven weeks the {place} could be "
    "reached only by boat, and the {trade}, who owned the largest, became a rich man. When the new bridge was opened "
    "he did not come to the feast. The schoolmaster wrote that the stones had been brought from the quarry at {town}, "
    "forty wagons a day, and that the mason's youngest son had carved a {bird} on the middle arch, where only boatmen "
    "see it.\n\n"
    "In the autumn a {artist} came from the city and rented the room above the bakery. She painted the bridge from "
    "the north bank every morning until the first snow, and nobody bought a picture. Twelve of them hang in the town "
    "hall today. On the last one the {bird} can be seen, though it is no larger than a thumbnail, and the water is "
    "the colour of slate.\n\n"
    "The bridge carries two lanes and a tramline now. The arches were widened in 1931, and a lamp was put on each "
    "pier. Boatmen still call the middle one the {bird}'s arch, and on the first Sunday of May the children throw "
    "bread from it, for luck, into the fastest part of the stream. The {trade}'s house is a school, and its bell is "
    "the one that called the boats in fog. Every tenth winter the ice reaches the second arch, and the tram stops on "
    "both sides."
)
_WORDS: Final = {
    "place": ("village", "town", "parish", "valley"),
    "trade": ("miller", "baker", "tanner", "brewer"),
    "town": ("Harlow", "Marlow", "Ludlow", "Barlow"),
    "bird": ("heron", "raven", "swan", "falcon"),
    "artist": ("painter", "sculptor", "draughtsman", "stranger"),
}
_NAMES: Final = ("Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo")
_TOWNS: Final = ("Harlow", "Marlow", "Ludlow", "Barlow", "Winslow", "Onslow", "Hounslow", "Wilmslow")
_JOBS: Final = ("mason", "miller", "painter", "engineer", "teacher", "ferryman", "baker", "surveyor")


def edit_prompt(seed: str) -> str:
    """A text of 400 tokens, the same with other words, the text again, and the beginning of the other."""
    chosen = random.Random(seed)
    words = {name: chosen.sample(among, 2) for name, among in _WORDS.items()}
    text, edited = (_TEXT.format(**{name: pair[which] for name, pair in words.items()}) for which in (0, 1))
    return "\n\n###\n\n".join((text, edited, text, edited[: edited.index(" could be reached")]))


def extract_prompt(seed: str) -> str:
    """A document about people, and what it says of the first of them as JSON, a line each."""
    chosen = random.Random(seed)
    people = [
        {"name": name, "job": chosen.choice(_JOBS), "town": chosen.choice(_TOWNS), "age": chosen.randrange(20, 80)}
        for name in chosen.sample(_NAMES, len(_NAMES))
    ]
    told = " ".join(f"{one['name']}, {one['age']}, is a {one['job']} and lives in {one['town']}." for one in people)
    return f"{told}\n\n" + "".join(f"{json.dumps(one)}\n" for one in people[:4])


async def edit(server: Running, work: Work, *, clients: int) -> Metrics:
    """Half of the texts are given back greedily, half at a temperature of 0.8."""
    each, tokens = (2, 96) if work.quick else (4, 360)
    tasks = [
        [
            work.task(0, tokens, prefix=edit_prompt(f"{work.seed} {client} {n}"), sampling=(GREEDY, SAMPLING)[n % 2])
            for n in range(each)
        ]
        for client in range(clients)
    ]
    return _told(await load.closed_loop(server, tasks))


async def extract(server: Running, work: Work) -> Metrics:
    """Fields of eight people, for one client."""
    each, tokens = (1, 96) if work.quick else (4, 200)
    tasks = [
        work.task(0, tokens, prefix=extract_prompt(f"{work.seed} {n}"), sampling=(GREEDY, SAMPLING)[n % 2])
        for n in range(each)
    ]
    return _told(await load.closed_loop(server, [tasks]))


def _told(samples: list[Sample]) -> Metrics:
    """With the tokens of an event: of a server that tells each step at once, those it wrote in a step."""
    tokens, events = sum(one.tokens for one in samples), sum(len(set(one.token_s)) for one in samples)
    return {**summarise(samples), "tokens_per_event": tokens / events}
