"""The command line: `entry` begins it, `commands` reads options, `actions` does what they ask, `console` shows it."""

from orchd.cli.entry import main

__all__ = ["main"]
