"""What `orchd serve` shows: progress on stderr while models load, then one screen on stdout.

A terminal gets a moving bar and colour; a pipe, a file or a journal gets plain lines.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
import uuid
from typing import TextIO
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from orchd import __version__
from orchd.observer import PoolSummary, Summary
from orchd.settings.addresses import is_loopback

DEFAULT_URL = "http://127.0.0.1:8737"
QUESTION = "Name three rivers."
PROMPT = "The three longest rivers in Europe are"


def console_for(stream: TextIO) -> Console:
    """A console that is plain unless the stream is a terminal, whatever the environment says."""
    plain = not stream.isatty()
    return Console(
        file=stream,
        force_terminal=False if plain else None,
        no_color=True if plain else None,
        highlight=False,
        width=200 if plain else None,  # nobody folds a pipe's lines, and scripts should not see them folded
    )


def set_up_logging(err: Console, *, verbosity: int = 0) -> None:
    """Logs of orchd and its engines go to stderr, beside a progress bar if there is one.

    Other libraries stay at warnings even when verbose: aiohttp's access log would print URLs, and a URL may
    hold a token.

    Args:
        err: Where they go.
        verbosity: 0 for what an owner should know, and on a terminal a quiet line for each task that has ended; 1 for
            everything that orchd decides; 2 for all that llama.cpp says besides.
    """
    if err.is_terminal:
        handler: logging.Handler = _TerminalHandler(err)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%X"))
    else:
        handler = logging.StreamHandler(err.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("orchd").setLevel(logging.DEBUG if verbosity else logging.INFO)
    logging.getLogger("engines").setLevel(logging.DEBUG if verbosity > 1 else logging.INFO)
    tasks = logging.getLogger("orchd.tasks")
    quiet = err.is_terminal and not verbosity
    tasks.handlers.clear()
    if quiet:
        tasks.addHandler(_QuietHandler(err))
    tasks.propagate = not quiet
    tasks.setLevel(logging.NOTSET if quiet or verbosity else logging.WARNING)


class _TerminalHandler(logging.Handler):
    """A line for each record, above a progress bar if there is one; the terminal folds it."""

    def __init__(self, err: Console) -> None:
        super().__init__()
        self._err = err

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else "dim"
        self._err.print(Text(self.format(record), style), soft_wrap=True)


class _QuietHandler(logging.Handler):
    """One dim line, never two: the end of the line is cut off at the terminal's edge, and so is the end of the id."""

    def __init__(self, err: Console) -> None:
        super().__init__(logging.INFO)
        self._err = err

    def emit(self, record: logging.LogRecord) -> None:
        """Print it; see `orchd.task_log`, whose first argument is always the task's id."""
        assert isinstance(record.args, tuple)  # logging makes one of all arguments but a single dict
        task_id, *rest = record.args
        line = time.strftime("%X ") + record.msg % (str(task_id)[:8], *rest)
        self._err.print(Text(line, "dim"), no_wrap=True, overflow="ellipsis")


class ServeConsole:
    """An `orchd.observer.Observer` for a person, or for a log."""

    def __init__(self, *, out: Console | None = None, err: Console | None = None) -> None:
        self.out = out or console_for(sys.stdout)
        self.err = err or console_for(sys.stderr)
        self._live = self.err.is_terminal and not self.err.is_dumb_terminal
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}
        self._quarters: dict[str, int] = {}

    def loading(self, label: str, share: float) -> None:
        """A bar on a terminal, else a line for each quarter."""
        if self._live:
            self._show_bar(label, share)
            return
        quarter = min(int(share * 4), 4)
        if quarter > self._quarters.get(label, -1):
            self._quarters[label] = quarter
            self._say(f"loading {label}: {quarter * 25} %")

    def loaded(self, label: str, seconds: float) -> None:
        """The bar goes, a line stays."""
        self._quarters.pop(label, None)
        if self._progress is not None and label in self._bars:
            self._progress.remove_task(self._bars.pop(label))
            if not self._bars:
                self.close()
        self._say(f"loaded {label} in {seconds:.1f} s")

    def ready(self, summary: Summary) -> None:
        """What to do now: address, token, models, a command to copy."""
        self.close()
        for line in ready_screen(summary):
            self.out.print(line, soft_wrap=True)
        self.out.file.flush()
        if not is_loopback(host := urlsplit(summary.url).hostname or ""):
            warning = f"{host}: anyone on the network can connect, and plain HTTP exposes the token"
            self.err.print(Text.assemble(("warning: ", "yellow"), warning), soft_wrap=True)

    def stopping(self, running: int) -> None:
        """What it still waits for."""
        self.close()
        if running:
            tasks = "1 running task" if running == 1 else f"{running} running tasks"
            self._say(f"stopping: waiting for {tasks} to finish; press Ctrl-C again to quit at once")
        else:
            self._say("stopping")

    def stopped(self) -> None:
        """The last line."""
        self.close()
        self._say("stopped")

    def close(self) -> None:
        """Takes the progress bars off the screen. Harmless when there are none."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._bars.clear()

    def _say(self, line: str) -> None:
        self.err.print(Text(line), soft_wrap=True)

    def _show_bar(self, label: str, share: float) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("loading {task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=self.err,
                transient=True,
            )
            self._progress.start()
        if label not in self._bars:
            self._bars[label] = self._progress.add_task(label, total=1.0)
        self._progress.update(self._bars[label], completed=share)


def ready_screen(summary: Summary) -> list[Text]:
    """The screen's lines; none holds the token."""
    width = max(len(pool.id) for pool in summary.pools)
    return [
        Text.assemble((f"orchd {__version__}", "bold"), " is ready at ", (summary.url, "bold green")),
        Text(),
        Text.assemble(("  token  ", "dim"), summary.token_origin),
        *(
            Text.assemble((f"  {'pool' if pool is summary.pools[0] else '':4}   ", "dim"), _pool(pool, width))
            for pool in summary.pools
        ),
        Text(),
        Text("Try it from another shell:"),
        Text(),
        Text(run_line(summary), "cyan"),
        Text(),
        *(Text(line, "cyan") for line in curl_pair(summary)),
        Text(),
    ]


def curl_pair(summary: Summary) -> list[str]:
    """Two commands that work as they stand: submit under a task id made here, then stream its answer.

    curl reads the header with the token from stdin: what stands in a command, every user of the machine can list.

    `prompt` and not `messages`, because a model without a chat template can answer it too.
    """
    task: dict[str, object] = {"task_id": str(uuid.uuid4())}
    if len(summary.pools) > 1:
        task["pool_id"] = next(pool.id for pool in summary.pools if pool.failure is None)
    body = json.dumps(task | {"prompt": PROMPT, "max_tokens": 48})
    header = "printf 'Authorization: Bearer %s\\n' \"$ORCHD_TOKEN\" |"
    if summary.token_file is not None:
        header = f"sed 's/^/Authorization: Bearer /' {shlex.quote(summary.token_file)} |"
    return [
        f"{header} curl -sS -w '\\n' -H @- {summary.url}/v1/tasks \\",
        f"  -d {shlex.quote(body)}",
        f"{header} curl -sSN -H @- {summary.url}/v1/tasks/{task['task_id']}/stream",
    ]


def run_line(summary: Summary) -> str:
    """A command that works as it stands, on this account."""
    options = [] if summary.url == DEFAULT_URL else ["--url", summary.url]
    if len(summary.pools) > 1:
        options += ["--pool", next(pool.id for pool in summary.pools if pool.failure is None)]
    return shlex.join(["orchd", "run", *options, QUESTION])


def _pool(pool: PoolSummary, width: int) -> str:
    if pool.failure is not None:
        return f"{pool.id:{width}}  not served: {pool.failure}"
    devices = ", ".join(
        f"{pool.replicas.count(device)} × {device}" if pool.replicas.count(device) > 1 else device
        for device in dict.fromkeys(pool.replicas)
    )
    slots = "1 slot" if pool.slots == 1 else f"{pool.slots} slots"
    each = " each" if len(pool.replicas) > 1 else ""
    return f"{pool.id:{width}}  {pool.model_id} on {devices}, {slots}{each} of {pool.ctx} tokens"
