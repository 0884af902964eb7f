"""The command line. `entry` finds the command, `commands` has a module for each, `console` shows what a server does."""

from orchd.cli.entry import app, main

__all__ = ["app", "main"]
