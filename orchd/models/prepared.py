"""What a request is to one model: the same for a task that comes and for one that waits while a reload happens."""

from __future__ import annotations

import array
from typing import NamedTuple

from engines.api import Grammar


class Prepared(NamedTuple):
    """What a request is to one model.

    Attributes:
        tokens: Its prompt.
        grammar: Its schema; None where it has none.
    """

    tokens: array.array[int]
    grammar: Grammar | None
