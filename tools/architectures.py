"""Tiny models of all architectures, served as a busy server serves them: ``make test-architectures``.

``python -m tools.architectures [FOLDER]`` vets each ``*.gguf`` of a folder, by default those that llama.cpp's own test
program wrote there, and compares what four slots answer with what one does (`testkit.alike`). Each model has a process
of its own, which may die. The result is one line for each, and 1 if one is not as `REFUSED` and `FEW_SLOTS` say.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from engines.api import ModelSpec
from engines.errors import EngineError
from engines.llamacpp.vet import vet
from orchd.machine.cores import usable_cores

MODELS: Final = Path(__file__).parents[1] / "build/architectures"
SLOTS: Final = 4
TIME_LIMIT_S: Final = 600.0

REFUSED: Final = {
    "dream": "a diffusion model",
    "llada": "a diffusion model",
    "llada-moe": "a diffusion model",
    "rnd1": "a diffusion model",
    "t5": "it has an encoder",
}
"""Architectures that do not continue text, with the reason."""

FEW_SLOTS: Final = {
    "plamo2": "llama.cpp writes states beside their cells and aborts, where the first slot is idle and two work",
}
"""Architectures that can only be served with up to two slots, with the reason."""

_FAULT: Final = 1
_KIND = re.compile(r"-(dense|moe)$")  # llama.cpp's test program names files so


def main() -> int:
    """The command: prints one line for each model."""
    parser = argparse.ArgumentParser(prog="python -m tools.architectures", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=MODELS, help="where *.gguf are; default: in build/")
    parser.add_argument("--only", default="", metavar="REGEX", help="only models whose name matches")
    parser.add_argument("--jobs", type=int, default=usable_cores(), metavar="N", help="models at once")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        return _examine(options.one)
    paths = sorted(path for path in options.folder.glob("*.gguf") if re.search(options.only, path.stem))
    if not paths:
        print(f"there is no model to compare in {options.folder}; 'make test-architectures' writes them")
        return 2
    began_s, faults = time.monotonic(), 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for path, (alike, found) in zip(paths, pool.map(_in_a_process, paths), strict=True):
            faults += not alike
            print(f"{path.stem:24} {'' if alike else 'FAULT: '}{found}", flush=True)
    print(f"{len(paths)} models, {faults} faults, {time.monotonic() - began_s:.0f} s")
    return _FAULT if faults else 0


def _in_a_process(path: Path) -> tuple[bool, str]:
    """Whether a model is as it should be, and what was found."""
    command = [sys.executable, "-m", "tools.architectures", "--one", str(path)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OPENBLAS_NUM_THREADS": "1"}
    try:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        return False, f"it took longer than {TIME_LIMIT_S:.0f} s"
    if process.returncode < 0 or not process.stdout:
        said = process.stderr.strip().splitlines() or ["nothing was said"]
        return False, f"the process ended with {process.returncode}: {said[-1]}"
    return process.returncode == 0, process.stdout.strip()


def _examine(path: Path) -> int:
    """One model: prints what was found; 1 if that is a fault."""
    logging.disable(logging.CRITICAL)
    architecture = _KIND.sub("", path.stem)
    spec = ModelSpec(path, slots=SLOTS)
    try:
        vet(spec)
    except EngineError as error:
        if architecture in REFUSED:
            print(f"refused, as it should be: {error}")
            return 0
        if architecture not in FEW_SLOTS:
            print(f"refused: {error}")
            return _FAULT
        spec = dataclasses.replace(spec, slots=2)
    else:
        if architecture in REFUSED | FEW_SLOTS:
            print(f"vetting took it, though it should not: {(REFUSED | FEW_SLOTS)[architecture]}")
            return _FAULT
    from testkit.alike import compare  # loads llama.cpp: only in this process

    try:
        found = compare(spec)
    except EngineError as error:
        print(f"{type(error).__name__}: {error}")
        return _FAULT
    print(found.told if spec.slots == SLOTS else f"{found.told} ({spec.slots} slots)")
    return 0 if found.alike else _FAULT


if __name__ == "__main__":
    sys.exit(main())
