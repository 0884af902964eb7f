"""One module a command: its options, its help, and what it does. `orchd.cli.entry` imports only the one that is run."""
