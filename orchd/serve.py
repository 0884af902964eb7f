"""`orchd serve` as a process: configuration in, a server until a signal says stop, an exit code out."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from engines.llamacpp.build import gpu_backend, identity
from orchd.garbage import expect_garbage
from orchd.machine import cores, devices, gpus
from orchd.models import references
from orchd.models.vetted import Vetted
from orchd.observer import Guarded, Observer
from orchd.process import listen, raise_file_limit, stop_on_signals, take_short_turns
from orchd.server import JOIN_S, Server
from orchd.settings.addresses import url_of
from orchd.settings.config import Config
from orchd.settings.credentials import Credentials
from orchd.settings.running import RunningServer, announced
from orchd.settings.sources import working_folder

_log = logging.getLogger(__name__)


def serve(
    config: Config, credentials: Credentials, *, observer: Observer, last_words: Callable[[], object] | None = None
) -> int:
    """Serve until SIGINT, SIGTERM or SIGHUP; a second one leaves at once.

    Args:
        config: The whole configuration.
        credentials: The token.
        observer: Is told how the start and the stop go.
        last_words: Writes out what was printed and is not written yet; called where a thread hangs and the process is
            ended under it.

    Returns:
        The process's exit code.

    Raises:
        ConfigError: A device, a model or the address cannot be used as configured.
    """
    with contextlib.suppress(ValueError, OSError, RuntimeError):  # standard error is no file, or closed
        # llama.cpp can end the process: then the log says where. Only the thread that failed is listed: the
        # others run on while they are read, and reading them can fail itself and replace the signal.
        faulthandler.enable(all_threads=False)
    raise_file_limit()
    take_short_turns()
    roots = [Path(root) for root in config.models.roots]
    references.check_roots(roots)
    base = config.source.parent if config.source is not None else working_folder()
    owned = [references.resolve_owned(pool.model, base=base, roots=roots) for pool in config.pools]
    placed, used = devices.assign(
        config.pools,
        gpus.visible(gpus.find_gpus(), os.environ),
        gpu_build=gpu_backend() is not None,
        cores=cores.usable_cores(),
        cpus=cores.crowded_cpus(),
    )
    gpus.show_only(used, os.environ)
    from engines.llamacpp.engine import (
        LlamaCppEngine,  # loads llama.cpp, which looks for GPUs now and never again
    )

    listening = listen(config.server.host, config.server.port)
    server = Server(config, credentials, LlamaCppEngine(), placed, observer, vetted=Vetted(identity()))

    async def run() -> int:
        stop = asyncio.Event()
        stop_on_signals(stop)
        return await server.run(owned, listening, stop=stop)

    me = RunningServer(
        url_of(config.server.host, listening.getsockname()[1]),
        config=None if config.source is None else os.path.realpath(config.source),
        token_file=None if credentials.file is None else os.path.abspath(credentials.file),
    )
    expect_garbage()
    with contextlib.closing(listening), announced(me):
        code = asyncio.run(run())
    ended = not server.left_behind and _threads_end()
    Guarded(observer).stopped()  # the last line, after what is said of threads that do not end
    if not ended:
        _leave(code, last_words)
    return code


def _threads_end() -> bool:
    """Whether the threads for prompts and schemas have ended, which Python would wait for however long they take."""
    deadline = time.monotonic() + JOIN_S
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                _log.error("the thread %s hangs and is abandoned", thread.name)
                return False
    return True


def _leave(code: int, last_words: Callable[[], object] | None) -> NoReturn:
    """End the process although a thread hangs: Python would wait for one, and take llama.cpp apart under another."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            stream.flush()
    if last_words is not None:
        last_words()
    os._exit(code)
