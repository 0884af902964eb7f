"""Everything worth knowing of a GPU, in the order of its importance, until a budget is used up.

    python -m benchmarks.gpu.campaign [--device gpu:0] [--budget 540] [--only PART ...] [--list]

The bundle's `run.sh` runs this. Each part is a process of its own; what it says goes to ``log.txt`` line by line, and
when it ends, ``summary.md`` and ``figures.json`` are written anew: whoever cuts this off loses only what had not begun.
A part for which too little time is left is not begun, and the next one is looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

from benchmarks.gpu.parts import Part, parts

STOP_S: Final = 20.0
"""How long a part that is out of time may take to stop its servers; kept back from the budget."""
MARK: Final = "ORCHD_CAMPAIGN"
"""A variable that a part's processes inherit, by which those that it left behind are found."""


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        state: ``done``, ``failed``, ``out of time`` or ``cut off`` while it ran, ``not begun`` or ``not there``.
        seconds: How long it ran.
        why: If it is not done.
        lines: What is worth repeating of what it said.
        figures: The content of its JSON file.
    """

    part: Part
    state: str
    seconds: float = 0.0
    why: str = ""
    lines: list[str] = field(default_factory=list)
    figures: Any = None


class Campaign:
    """Runs parts one after the other.

    Args:
        results: The folder to write to.
        deadline: In seconds of ``clock``.
        clock: Seconds, as `time.time` counts them.

    Attributes:
        cut_off: Set from a signal handler: the part that runs is ended.
    """

    def __init__(self, results: Path, deadline: float, *, title: str, clock: Callable[[], float] = time.time) -> None:
        results.mkdir(parents=True, exist_ok=True)
        self.outcomes: list[Outcome] = []
        self.cut_off = threading.Event()
        self._results = results
        self._deadline = deadline
        self._title = title
        self._clock = clock

    @property
    def left_s(self) -> float:
        """For parts: what is left of the budget, less what stopping one may take."""
        return self._deadline - self._clock() - STOP_S

    def run(self, part: Part) -> Outcome:
        """Run a part, if there is time, and write what is known by then."""
        outcome = self._run(part)
        self.outcomes.append(outcome)
        self._write()
        return outcome

    def _run(self, part: Part) -> Outcome:
        if part.absent:
            return Outcome(part, "not there", why=part.absent)
        if self.left_s < part.least_s:
            left = max(self.left_s, 0)
            return Outcome(part, "not begun", why=f"{left:.0f} s were left, and it takes {part.least_s:.0f} s at least")
        limit_s = min(self.left_s, part.most_s)
        began = self._clock()
        with (self._results / "log.txt").open("a", buffering=1) as log:
            log.write(f"\n=== {part.name}: {part.about}\n$ {' '.join(part.command)}\n")
            code, lines = self._watch(part, limit_s, log)
        outcome = Outcome(part, "done", self._clock() - began, lines=lines, figures=_figures(part))
        if self.cut_off.is_set():
            outcome.state, outcome.why = "cut off", "the campaign was ended from outside"
        elif code is None:
            outcome.state, outcome.why = "out of time", f"it was stopped after {limit_s:.0f} s"
        elif code not in part.fine:
            outcome.state, outcome.why = "failed", f"it ended with {code}; log.txt has what it said"
        return outcome

    def _watch(self, part: Part, limit_s: float, log: TextIO) -> tuple[int | None, list[str]]:
        """Run its command. Returns the exit code, None if it had to be stopped, and the lines worth repeating."""
        lines: list[str] = []
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **part.environment, MARK: mark, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

        def follow() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                print(f"  {line}", end="", flush=True)
                if part.worth.search(line):
                    lines.append(line.rstrip())

        reader = threading.Thread(target=follow, daemon=True)
        reader.start()
        code, until = None, time.monotonic() + limit_s
        while code is None and time.monotonic() < until and not self.cut_off.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(0.1)
        if code is None:
            process.send_signal(signal.SIGINT)  # Python's programs then stop the servers that they have started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S / 2)
        _kill_marked(mark)
        process.wait()
        reader.join(STOP_S / 4)
        return code, lines

    def _write(self) -> None:
        _replace(self._results / "summary.md", summary(self._title, self.outcomes))
        found = [
            {
                **{"part": one.part.name, "about": one.part.about, "command": one.part.command, "state": one.state},
                **{"seconds": round(one.seconds, 1), "why": one.why, "lines": one.lines, "figures": one.figures},
            }
            for one in self.outcomes
        ]
        _replace(self._results / "figures.json", json.dumps({"title": self._title, "parts": found}, indent=1) + "\n")


def summary(title: str, outcomes: Sequence[Outcome]) -> str:
    """A table of the parts, and what each has to say."""
    rows = [f"| {one.part.name} | {one.part.about} | {one.state} | {one.seconds:.0f} |" for one in outcomes]
    text = [f"# {title}", "", "| part | what | state | seconds |", "| --- | --- | --- | ---: |", *rows]
    for one in outcomes:
        if one.lines or one.why:
            said = [f"{one.state}: {one.why}"] if one.why else []
            text += ["", f"## {one.part.name}: {one.part.about}", "", "```", *said, *one.lines, "```"]
    return "\n".join(text) + "\n"


def _kill_marked(mark: str) -> None:
    """End what a part has left behind, in whatever process group it is."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


def _figures(part: Part) -> Any:
    """The content of its JSON file, as far as it got."""
    if part.json is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        return json.loads(part.json.read_text())
    return None


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.campaign", description=(__doc__ or "").splitlines()[0]
    )
    made.add_argument("--device", default="gpu:0", metavar="gpu:N", help="or cpu, to try it (default: gpu:0)")
    made.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="(default: 540)")
    made.add_argument("--only", nargs="+", metavar="PART", help="of those that --list names")
    made.add_argument("--list", action="store_true", help="name the parts in their order, and run none")
    made.add_argument("--model", type=Path, metavar="FILE", help="instead of the synthetic 8B")
    made.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="(default: results)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; exit with 0 if all that were begun are done, 1 if one failed, 2 if a name is wrong."""
    options = parser().parse_args(arguments)
    began = float(os.environ.get("ORCHD_BUNDLE_BEGAN", time.time()))
    chosen = parts(options.device, options.results, model=options.model)
    names = [part.name for part in chosen]
    if options.list:
        for part in chosen:
            print(f"{part.name:16} {part.about}{f' ({part.absent})' if part.absent else ''}")
        return 0
    if unknown := [name for name in options.only or () if name not in names]:
        print(f"campaign: there is no part {unknown[0]!r}; they are: {', '.join(names)}", file=sys.stderr)
        return 2
    title = f"orchd on {options.device}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime(began))} UTC"
    campaign = Campaign(options.results, began + options.budget, title=title)
    for which in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # never an exception: it could come between a part's start and its name
        signal.signal(which, lambda *_: campaign.cut_off.set())
    for part in chosen:
        if options.only and part.name not in options.only:
            continue
        print(f"==> {part.name}: {part.about} ({max(campaign.left_s, 0):.0f} s left)", flush=True)
        outcome = campaign.run(part)
        print(f"<== {part.name}: {outcome.state}, {outcome.seconds:.0f} s {outcome.why}".rstrip(), flush=True)
        if campaign.cut_off.is_set():
            print(f"campaign: cut off; what was measured is in {options.results}", file=sys.stderr)
            return 130
    states = [one.state for one in campaign.outcomes]
    took = f"{time.time() - began:.0f} s"
    print(f"{states.count('done')} of {len(states)} parts done in {took}; see {options.results}/summary.md")
    return 1 if "failed" in states else 0


if __name__ == "__main__":
    sys.exit(main())
