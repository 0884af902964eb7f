"""What a request is to one model: the same for a task that comes and for one that waits while a reload happens."""

from __future__ import annotations

from typing import NamedTuple

from engines.api import Grammar, Prompt


class Prepared(NamedTuple):
    """What a request is to one model.

    Attributes:
        prompt: Its tokens.
        grammar: Its schema; None where it has none.
    """

    prompt: Prompt
    grammar: Grammar | None
