"""How often Python's garbage collector looks at all objects."""

from __future__ import annotations

import gc
from typing import Final

AT_START: Final = 50_000
"""Objects made since its last look. Python's own 700 is for programs that start with few: imports make 130,000 that
stay, and 190 looks at them are a tenth of a start."""

_USUAL: Final = gc.get_threshold()


def expect_imports() -> None:
    """Look seldom, while what is made stays."""
    gc.set_threshold(AT_START)


def expect_garbage() -> None:
    """Look as often as usual, but no more at what is there by now: what a long-lived process makes goes away again."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
