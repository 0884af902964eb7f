"""Writes synthetic models, unless they are there: ``python -m benchmarks.gpu.models FOLDER 8B-Q4_K-0 ...``"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import gguf

from testkit.synthetic_gguf import SHAPES, write


def write_named(folder: Path, name: str) -> Path:
    """The model ``SHAPE-TYPE-SEED``; without a seed it is 0."""
    shape, kind, *seed = name.split("-")
    path = folder / f"synthetic-{name}.gguf"
    if not path.exists():
        partial = path.with_suffix(".partial")
        write(partial, SHAPES[shape], gguf.GGMLQuantizationType[kind], seed=int(seed[0]) if seed else 0)
        partial.rename(path)
    return path


def main() -> None:
    """Write them, and say how large each is and how long that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", metavar="SHAPE-TYPE[-SEED]")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        began = time.monotonic()
        path = write_named(options.folder, name)
        print(f"{path.name}: {path.stat().st_size / 2**30:.2f} GiB in {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
