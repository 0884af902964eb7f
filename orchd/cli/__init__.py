"""The command line. `commands` reads options, `actions` does what they ask, `console` shows what a server does."""

from orchd.cli.commands import app, main

__all__ = ["app", "main"]
