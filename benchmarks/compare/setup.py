"""What has to be there before anything is measured: the models, and the facts about this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

from engines.llamacpp.build import gpu_backend
from orchd.machine.cores import usable_cores
from orchd.models.references import demo_model_path
from testkit.tiny_gguf import write_tiny_llama

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / "build" / "bench"
PEER_BIN: Final = ROOT / "build" / "peer" / "bin"


class SetupError(Exception):
    """Something the benchmark needs is not there; the message says what to do."""


def peer_binaries(named: Path | None) -> Path:
    """The folder of llama-server and llama-quantize: named, ``ORCHD_PEER_BIN``, or what `make bench` builds."""
    folder = named or Path(os.environ.get("ORCHD_PEER_BIN", PEER_BIN))
    if not (folder / "llama-server").is_file():
        raise SetupError(f"there is no llama-server in {folder}; build it: cmake --build build --target llama_server")
    return folder.resolve()


def demo_models(binaries: Path, *, quick: bool) -> list[Path]:
    """The demo model requantised to Q4_0, and unless it is to be quick also as it is shipped."""
    shipped = demo_model_path()
    if shipped is None:
        raise SetupError("the demo model is not installed; run 'make setup', or give --model FILE")
    CACHE.mkdir(parents=True, exist_ok=True)
    requantised = CACHE / f"{shipped.stem.rpartition('.')[0] or shipped.stem}.Q4_0.gguf"
    if not requantised.exists():
        partial = requantised.with_suffix(".partial")
        command = [str(binaries / "llama-quantize"), "--allow-requantize", str(shipped), str(partial), "Q4_0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        partial.rename(requantised)
    return [requantised] if quick else [shipped, requantised]


def tiny_model() -> Path:
    """The generated model, of one layer with one head: its forward pass costs next to nothing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    return write_tiny_llama(CACHE / "tiny-llama.gguf", least=True)


def host_class() -> str:
    """Machines whose figures may be compared, for file names."""
    return f"{platform.machine()}-{usable_cores()}core{f'-{gpu.lower()}' if (gpu := gpu_backend()) else ''}"


def facts() -> dict[str, str]:
    """What the figures depend on besides the options."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    cpu = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "host": f"{cpu.group(1) if cpu else platform.machine()}, {usable_cores()} cores, Linux {platform.release()}",
        "orchd": commit.stdout.strip() or "no git checkout",
        "llama.cpp": f"as in llama-cpp-python {importlib.metadata.version('llama-cpp-python')}",
        "python": platform.python_version(),
        "command": " ".join(["python -m benchmarks.compare", *sys.argv[1:]]),
    }
