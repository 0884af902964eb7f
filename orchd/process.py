"""What a process that serves asks of its account and of Python: a socket, open files, signals, its turn."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys

from orchd.errors import ConfigError
from orchd.settings.addresses import bind_remedy, resolve

MOST_FILES = 65536
"""Open files to ask for, where the account may have more."""
SWITCH_INTERVAL_S = 0.0005
"""How long a thread waits for Python's lock before it asks the one that computes to hand it over, a tenth of Python's
own: beside a thread that renders a template, the event loop waits so long (`benchmarks.sampling`)."""


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket, so that a port in use is known before a model is loaded."""
    family, address = resolve(host, port)
    listening = None
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ConfigError(f"cannot listen on {host}:{port} ({error.strerror}); {bind_remedy(error)}") from None
    return listening


def raise_file_limit() -> None:
    """Allow as many open files as the account may have: each client and each listener takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def take_short_turns() -> None:
    """Let threads that wait for Python's lock have it soon."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def stop_on_signals(stop: asyncio.Event) -> None:
    """The first SIGINT, SIGTERM or SIGHUP sets the event; the second ends the process on the spot."""
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal, number)
