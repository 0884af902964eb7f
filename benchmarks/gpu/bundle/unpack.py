"""Unpacks orchd into an environment of its own beside this file, then runs the campaign.

`run.sh` starts it with the Python that the bundle's wheels are for; it needs the standard library alone. What is
missing is said in one sentence, before anything is unpacked.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ARCHIVE = "orchd.tar.xz"
MODELS_BYTES = 7 * 10**9
"""What the campaign writes for a GPU: two models of 1B, one of 8B, and the small ones."""
UNPACKED_BYTES = 10**9
CPU_FLAGS = {"x86_64": {"avx2", "bmi2", "f16c", "fma"}}
"""What the CPU's part of a CUDA build is compiled for."""
CUBLAS = ("libcublas.so.13", "libcublasLt.so.13")
OLDEST_DRIVER = {13: 580}
"""Versions of NVIDIA's driver that first run a major version of CUDA."""


class Unfit(Exception):
    """This machine, or what was asked for, does not fit the bundle; the message says what would."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="run.sh", description="Unpack orchd, test it and measure it on this machine.")
    made.add_argument(
        "--device", default="gpu:0", help="gpu:N as nvidia-smi counts (default: gpu:0); or cpu, to try it"
    )
    made.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="for everything (default: 540)")
    made.add_argument("--only", nargs="+", metavar="PART", help="of the parts that --list names")
    made.add_argument("--model", type=Path, metavar="FILE", help="a GGUF of your own instead of the synthetic 8B")
    made.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="(default: results)")
    made.add_argument("--home", type=Path, default=HERE / "unpacked", metavar="DIR", help="(default: unpacked)")
    made.add_argument("--list", action="store_true", help="name the parts in their order, and run none")
    made.add_argument("--unpack", action="store_true", help="unpack only, and say how to serve")
    return made


def check_machine(facts: dict[str, Any], device: str) -> None:
    """Raise `Unfit` if this machine cannot run what is in the bundle."""
    if platform.machine() != facts["machine"]:
        raise Unfit(f"the bundle is for {facts['machine']}, and this machine is {platform.machine()}")
    name, has = platform.libc_ver()
    if name != "glibc" or _numbers(has) < _numbers(facts["glibc"]):
        raise Unfit(
            f"the bundle needs glibc {facts['glibc']} or newer, and this machine has {name or 'none'} {has}".strip()
        )
    if facts["backend"] == "CUDA" and (lacks := sorted(CPU_FLAGS.get(facts["machine"], set()) - cpu_flags())):
        raise Unfit(f"this machine's CPU lacks {', '.join(lacks)}, which the bundle is compiled for")
    if device != "cpu":
        check_gpu(facts, device)


def cpu_flags() -> set[str]:
    """What the kernel says that the CPU can do."""
    found = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def check_gpu(facts: dict[str, Any], device: str) -> None:
    """Raise `Unfit` if there is no such GPU, or none that the bundle is built for. Asks the driver itself."""
    if facts["backend"] != "CUDA":
        raise Unfit("the bundle was made for the CPU; try it with --device cpu, or make one with: make gpu-bundle")
    number = re.fullmatch(r"gpu:(\d+)", device)
    if not number:
        raise Unfit(f"--device is {device!r}; it has to be gpu:N, as nvidia-smi counts, or cpu")
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        missing = str(error).partition(":")[0]
        raise Unfit(
            f"there is no NVIDIA driver here ({missing} was not found); to try the bundle without a GPU: --device cpu"
        ) from None
    if code := driver.cuInit(0):
        raise Unfit(
            f"NVIDIA's driver is installed, but finds no GPU (cuInit answers {code}); does nvidia-smi list one?"
        )
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    major = int(facts["cuda"].partition(".")[0])
    if version.value // 1000 < major:
        raise Unfit(
            f"the driver runs CUDA {version.value // 1000}.{version.value % 1000 // 10} at most, and the bundle needs "
            f"CUDA {major}: install driver {OLDEST_DRIVER.get(major, 'with a higher number')} or newer"
        )
    driver.cuDeviceGetCount(ctypes.byref(count))
    if int(number[1]) >= count.value:
        raise Unfit(f"there is no {device}; the driver shows {count.value} GPUs, the first of which is gpu:0")
    capability = "".join(str(_attribute(driver, int(number[1]), which)) for which in (75, 76))
    if capability not in facts["architectures"]:
        raise Unfit(
            f"{device} has compute capability {capability}, and the bundle was built for "
            f"{', '.join(facts['architectures'])}: make gpu-bundle CUDA_ARCHITECTURES={capability}"
        )


def _attribute(driver: Any, index: int, which: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, index)
    return value.value


def check_disk(home: Path, device: str) -> None:
    """Raise `Unfit` if models and environment do not fit where they are written."""
    needed = UNPACKED_BYTES + (0 if device == "cpu" else MODELS_BYTES)
    home.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(home).free) < needed:
        raise Unfit(
            f"{home} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed; name another disk with --home"
        )


def unpack(archive: Path, home: Path) -> Path:
    """The archive's content, and an environment with all of its wheels; nothing is done twice. Returns its Python."""
    python, stamp = home / "env" / "bin" / "python", home / "unpacked.sha256"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    stamp.unlink(missing_ok=True)
    for name in ("content", "env"):
        shutil.rmtree(home / name, ignore_errors=True)
    content = home / "content"
    try:
        with tarfile.open(archive, "r:xz") as tar:
            tar.extractall(content, filter="data")
    except tarfile.CompressionError:
        raise Unfit(
            f"{sys.executable} was built without lzma, which unpacks {archive.name}; use another Python"
        ) from None
    run([sys.executable, "-m", "venv", "--without-pip", str(home / "env")], "the environment could not be created")
    # pip's own wheel, because a Python of Debian has no pip until python3-venv is installed.
    pip = next((content / "wheels").glob("pip-*.whl")) / "pip"
    wheels = [str(wheel) for wheel in sorted((content / "wheels").glob("*.whl"))]
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", *wheels]
    run([str(python), str(pip), *install], "the wheels could not be installed")
    shutil.copy(content / "wheel-key.txt", home / "env" / ".orchd-wheel.txt")  # see `orchd.cli.versions`
    stamp.write_text(digest)
    return python


def run(command: Sequence[str], trouble: str) -> None:
    """Run a command. Raises `Unfit` with the end of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unfit(f"{trouble}: {(done.stderr or done.stdout).strip()[-500:]}")


def place_cublas(home: Path) -> str:
    """Link the machine's cuBLAS, or the bundle's stand-in, to where llama.cpp looks for it. Says which it is."""
    (folder,) = (home / "env" / "lib").glob("python3*/site-packages/nvidia/cu13/lib")
    if (folder / CUBLAS[0]).is_file() and not (folder / CUBLAS[0]).is_symlink():
        return "cuBLAS of the bundle"
    own = next((place for place in cublas_folders() if all((place / name).is_file() for name in CUBLAS)), None)
    for name in CUBLAS:
        (folder / name).unlink(missing_ok=True)
        if own is not None:
            (folder / name).symlink_to(own / name)
    if own is not None:
        return f"cuBLAS of this machine, {own}"
    (folder / CUBLAS[0]).symlink_to(home / "content" / "cublas" / CUBLAS[0])
    return "the bundle's stand-in for cuBLAS, because this machine has none: weights that are not quantised are slow"


def cublas_folders() -> Iterator[Path]:
    """Where a machine may have cuBLAS 13: a toolkit, its own libraries, an environment with PyTorch."""
    if "CUDA_HOME" in os.environ:
        yield Path(os.environ["CUDA_HOME"], "lib64")
    yield from sorted(Path("/usr/local").glob("cuda*/lib64"), reverse=True)
    yield from (Path(folder) for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"))
    pythons = dict.fromkeys(filter(None, map(shutil.which, ("python3", "python", "python3.12"))))
    for python in pythons:
        ask = "import sys; print(*sys.path, sep='\\n')"
        said = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False).stdout
        yield from (Path(line, "nvidia", "cu13", "lib") for line in said.splitlines() if line)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpack and run; exit with 2 and one sentence if that cannot be."""
    options = parser().parse_args(arguments)
    began = float(os.environ.get("ORCHD_BUNDLE_BEGAN", time.time()))
    facts = json.loads((HERE / "bundle.json").read_text())
    home = options.home.resolve()
    try:
        if options.model is not None and not options.model.is_file():
            raise Unfit(f"there is no file {options.model}")
        if not options.list:
            check_machine(facts, options.device)
            check_disk(home, options.device)
        python = unpack(HERE / ARCHIVE, home)
        cublas = place_cublas(home) if facts["backend"] == "CUDA" else ""
    except Unfit as error:
        print(f"run.sh: {error}", file=sys.stderr)
        return 2
    print(f"Unpacked into {home} in {time.time() - began:.0f} s.{f' With {cublas}.' if cublas else ''}", flush=True)
    if options.unpack:
        print(f"Serve a model: {home / 'env' / 'bin' / 'orchd'} serve --model FILE.gguf")
        return 0
    os.environ["ORCHD_BUNDLE_BEGAN"] = str(began)
    content = home / "content"
    os.environ["PYTHONPATH"] = str(content / "source")
    os.environ["ORCHD_TEST_VOCABULARY"] = str(content / "vocabulary.gguf")
    os.environ["ORCHD_PEER_BIN"] = str(content / "peer")
    os.environ["ORCHD_TEST_MODELS"] = str(home / "models")
    command = [
        str(python),
        "-m",
        "benchmarks.gpu.campaign",
        "--device",
        options.device,
        "--budget",
        str(options.budget),
    ]
    command += ["--results", str(options.results.resolve()), *(["--list"] if options.list else [])]
    command += [] if options.model is None else ["--model", str(options.model.resolve())]
    command += [] if options.only is None else ["--only", *options.only]
    os.chdir(content / "source")
    os.execv(python, command)


if __name__ == "__main__":
    sys.exit(main())
