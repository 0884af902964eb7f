"""Puts everything into one folder that orchd needs on a machine without a network: `make gpu-bundle` runs this.

    python -m tools.gpu_bundle --build build/bundle --peer build/bundle-peer/peer/bin --out build/gpu-bundle

Wheels are packed anew without compression, and then all of them together: llama.cpp's libraries are in their wheel by
three names each, and CUDA's kernels resemble one another, so that one archive is a third of the wheels.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from testkit.synthetic_gguf import write_vocabulary

ROOT: Final = Path(__file__).parents[1]
SCRIPTS: Final = ROOT / "benchmarks" / "gpu" / "bundle"
STAND_IN: Final = ROOT / "cmake" / "cublas_stand_in.cu"
PYTHON: Final = "3.12"
SOURCE: Final = (
    "orchd", "engines", "testkit", "benchmarks", "openapi", "pyproject.toml",
    "tests/conftest.py", "tests/gpu/__init__.py", "tests/gpu/device.py", "tests/gpu/test_cublas.py",
    "tests/gpu/test_on_gpu.py",
)  # fmt: skip
PROGRAMS: Final = ("llama-server", "llama-bench")
OF_THE_WHEEL: Final = ("libllama.so", "libggml")
"""Libraries that the programs take from the wheel, so that both compute with the same kernels."""
DICTIONARY_BYTES: Final = 256 << 20
"""How far apart xz finds things that are alike; unpacking takes as much memory."""
MANYLINUX: Final = (*(f"2_{minor}" for minor in (5, 12, 17, 24, 26, 27, 28, 31, 34, 35, 36)), "2014", "2010", "1")


class NotMade(Exception):
    """The bundle cannot be made; the message says why."""


def settings_of(build: Path) -> dict[str, str]:
    """What CMake decided for a build folder, by name without ``ORCHD_``."""
    file = build / "settings.cmake"
    if not file.is_file():
        raise NotMade(f"there is no {file}; run: make gpu-bundle")
    return dict(re.findall(r"set\(ORCHD_(\w+) \[\[(.*?)\]\]\)", file.read_text(), re.DOTALL))


def facts_of(settings: dict[str, str], machine: str, glibc: str) -> dict[str, object]:
    """What `unpack.py` compares the machine with."""
    cuda = re.search(r"^CUDA (\S+)$", settings["WHEEL_KEY_TEXT"], re.MULTILINE)
    named = re.search(r"-DCMAKE_CUDA_ARCHITECTURES=(\S+)", settings["LLAMA_ARGS"])
    return {
        "backend": "CUDA" if cuda else "CPU",
        "cuda": cuda[1] if cuda else "",
        "architectures": re.findall(r"(?:^|;)(\d+)", named[1]) if named else [],
        "machine": machine,
        "glibc": glibc,
        "llama-cpp-python": settings["LLAMA_VERSION"],
    }


def newest_glibc(files: Sequence[Path]) -> str:
    """The newest version of glibc that any of these libraries asks for."""
    wanted = {(2, 17)}
    for file in files:
        found = re.findall(rb"GLIBC_(\d+)\.(\d+)", file.read_bytes())
        wanted |= {(int(major), int(minor)) for major, minor in found}
    return ".".join(map(str, max(wanted)))


def store(wheel: Path, folder: Path) -> None:
    """Pack a wheel anew without compression; RECORD, which names sizes and hashes of the files, stays true."""
    with zipfile.ZipFile(wheel) as packed, zipfile.ZipFile(folder / wheel.name, "w", zipfile.ZIP_STORED) as stored:
        for entry in packed.infolist():
            made = zipfile.ZipInfo(entry.filename, entry.date_time)
            made.external_attr = entry.external_attr
            stored.writestr(made, packed.read(entry))


def download(requirements: Path, folder: Path, machine: str, *, only: str = "") -> None:
    """The wheels of a requirements file for the bundle's Python, by their hashes; with ``only`` those that begin so."""
    blocks = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", requirements.read_text(), flags=re.MULTILINE))
    chosen = folder / "requirements.txt"
    chosen.write_text("\n".join(block for block in blocks if block.startswith(only)) + "\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON]
    for version in MANYLINUX:
        separator = "_" if "_" in version else ""
        command += ["--platform", f"manylinux{separator}{version}_{machine}"]
    done = subprocess.run([*command, "--dest", str(folder), "--requirement", str(chosen)], check=False)
    chosen.unlink()
    if done.returncode:
        raise NotMade(f"the wheels that {requirements.name} lists could not be fetched")


def tracked(names: Sequence[str]) -> Iterator[str]:
    """Files of the repository under these names, whether or not they have been committed."""
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *names]
    done = subprocess.run(listed, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMade(f"the bundle is made from a git checkout; git says: {done.stderr.strip()}")
    yield from (name for name in done.stdout.splitlines() if (ROOT / name).is_file())


def collect(content: Path, settings: dict[str, str], peer: Path, machine: str, *, cublas: bool) -> dict[str, object]:
    """Everything that is unpacked on the other machine, into a folder. Returns the facts."""
    wheels = sorted(Path(settings["WHEEL_DIR"]).glob("*.whl"))
    if not wheels:
        raise NotMade(f"there is no wheel of llama.cpp in {settings['WHEEL_DIR']}; run: make gpu-bundle")
    (content / "wheels").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        fetched = Path(name)
        download(ROOT / "requirements" / "bundle.txt", fetched, machine)
        if settings["CUDA_RUNTIME"]:
            only = "" if cublas else "nvidia-cuda-runtime"
            download(Path(settings["CUDA_RUNTIME"]), fetched, machine, only=only)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
        if subprocess.run([*command, "--wheel-dir", str(fetched), str(ROOT)], check=False).returncode:
            raise NotMade("the wheel of orchd could not be built")
        for wheel in (*wheels, *sorted(fetched.glob("*.whl"))):
            store(wheel, content / "wheels")
        with zipfile.ZipFile(wheels[0]) as packed:
            packed.extractall(fetched / "llama")
        libraries = sorted((fetched / "llama").rglob("*.so*"))
        copy_programs(peer, content / "peer")
        facts = facts_of(settings, machine, newest_glibc([*libraries, *sorted((content / "peer").iterdir())]))
    for name in tracked(SOURCE):
        target = content / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    write_vocabulary(content / "vocabulary.gguf")
    (content / "wheel-key.txt").write_text(settings["WHEEL_KEY_TEXT"] + "\n")
    if facts["backend"] == "CUDA" and not cublas:
        build_stand_in(content / "cublas", settings)
    return facts


def copy_programs(peer: Path, folder: Path) -> None:
    """llama.cpp's programs and those of their libraries that are not in the wheel. One file has one name."""
    folder.mkdir(parents=True)
    for name in PROGRAMS:
        if not (peer / name).is_file():
            raise NotMade(f"there is no {name} in {peer}; run: make gpu-bundle")
        shutil.copy(peer / name, folder)
    for library in peer.glob("lib*.so*"):
        if library.name.startswith(OF_THE_WHEEL) or library.name.startswith("libllama-quantize"):
            continue
        is_whole = library.name.endswith(".so") and not library.is_symlink()
        if is_whole or re.search(r"\.so\.\d+$", library.name):  # the name that the programs ask for
            shutil.copy(library, folder)


def build_stand_in(folder: Path, settings: dict[str, str]) -> None:
    """Compile what takes the place of cuBLAS on a machine without it."""
    folder.mkdir(parents=True)
    options = dict(re.findall(r"-D(\w+)=(\S+)", settings["LLAMA_ARGS"]))
    architectures = re.findall(r"(?:^|;)(\d+)", options["CMAKE_CUDA_ARCHITECTURES"])
    command = [options["CMAKE_CUDA_COMPILER"], "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "shared"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    command += [options.get("CMAKE_CUDA_FLAGS", "-O3"), "-Xlinker", "-soname=libcublas.so.13"]
    command += ["-Xlinker", f"--version-script={STAND_IN.with_suffix('.map')}"]
    command += ["-Xlinker", "-rpath=$ORIGIN", "-o", str(folder / "libcublas.so.13"), str(STAND_IN)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMade(f"{STAND_IN.name} could not be compiled: {done.stderr.strip()[-500:]}")


def pack(content: Path, archive: Path) -> None:
    """One archive, the large alike files close together."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": DICTIONARY_BYTES}]
    with lzma.open(archive, "wb", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(content.rglob("*"), key=lambda path: (path.suffix, path.name)):
            tar.add(path, path.relative_to(content), recursive=False)


def read_me(facts: dict[str, object], sizes: dict[str, int], *, cublas: bool) -> str:
    """What is in the folder, and what is not."""
    built = f"CUDA {facts['cuda']}, compute capability {', '.join(map(str, facts['architectures']))}"  # type: ignore[call-overload]  # a list
    text = [
        "orchd for a machine without a network",
        "",
        f"Built for {built if facts['backend'] == 'CUDA' else 'the CPU'}.",
        f"Needs Python {PYTHON} and glibc {facts['glibc']} or newer.",
        "",
        "    ./run.sh                 unpack, test and measure on gpu:0, within 540 s; results/summary.md",
        "    ./run.sh --device cpu    the same without a GPU, with small models",
        "    ./run.sh --unpack        only unpack; then: unpacked/env/bin/orchd serve --model FILE.gguf",
        "    ./run.sh --help          the other options",
        "",
        "Left out: the demo model (its vocabulary is here; models of random weights are written on the machine),",
        "other tests than those of the GPU, the documentation"
        + ("" if cublas else ", cuBLAS (a stand-in is used where there is none)"),
        "",
        *(f"{size / 2**20:7.1f} MiB  {name}" for name, size in sizes.items()),
    ]
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the folder and say how large it is; exit with 1 if it is larger than it may be."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_bundle", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--build", type=Path, required=True, help="where CMake configured llama.cpp's wheel")
    parser.add_argument("--peer", type=Path, required=True, help="where llama-server and llama-bench are")
    parser.add_argument("--out", type=Path, required=True, help="the folder, made anew")
    parser.add_argument("--machine", default="x86_64")
    parser.add_argument("--cublas", action="store_true", help="with cuBLAS, which is 0.4 GB")
    parser.add_argument("--limit-mib", type=float, default=60.0, help="0 is none (default: 60)")
    options = parser.parse_args(arguments)
    out: Path = options.out
    try:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as name:
            content = Path(name, "content")
            facts = collect(content, settings_of(options.build), options.peer, options.machine, cublas=options.cublas)
            pack(content, out / "orchd.tar.xz")
            sizes = {
                path.name: sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
                for path in sorted(content.iterdir())
            }
    except NotMade as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 2
    for script in ("run.sh", "unpack.py"):
        shutil.copy(SCRIPTS / script, out)
    (out / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n")
    (out / "README.txt").write_text(read_me(facts, sizes, cublas=options.cublas))
    size = sum(file.stat().st_size for file in out.iterdir()) / 2**20
    print(f"{out}: {size:.1f} MiB")
    if options.limit_mib and size > options.limit_mib:
        print(
            f"gpu-bundle: that is more than {options.limit_mib:.0f} MiB; name fewer compute capabilities, or allow "
            "more: make gpu-bundle BUNDLE_MIB=0",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
