"""The command line. `entry` begins it, `group` finds the command, `commands` has a module for each."""

from orchd.cli.entry import main

__all__ = ["main"]
