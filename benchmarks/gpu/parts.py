"""The parts of a campaign on a GPU, the most important first."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.compare.scenarios import SCENARIOS, WITHOUT_GUESSES

SLOW_TESTS: Final = (
    "fifty_reloads or filled_to_its_limit or context_is_too_large or twentieth_of_a_step or synthetic_writer"
)
"""Those that write or load large models, or one many times."""
FIGURES: Final = re.compile(r"^(  goal|  MISS|  {7}\S|pair |\|)|tokens/s|targets? met|GiB of weights")
TESTS: Final = re.compile(r"^(FAILED|ERROR|E  )|\b(passed|failed|skipped|error)\b.* in ")
ROWS: Final = ("conversations-12", "edit-1", "json-8")
"""Of `benchmarks.compare`: the prompt cache, speculation, and guided output."""


@dataclass(frozen=True)
class Part:
    """Something that is measured by a command of its own.

    Attributes:
        name: In the results.
        about: The same in words.
        least_s: With less it is not worth beginning.
        most_s: After so long it is stopped, so that the next ones get their turn.
        json: A file that the command writes.
        fine: Exit codes with which it is done: some say that a goal was missed.
        worth: Which lines of its output the summary repeats.
        absent: Why there is no such part here; empty if there is.
    """

    name: str
    about: str
    command: list[str]
    least_s: float
    most_s: float
    json: Path | None = None
    fine: tuple[int, ...] = (0,)
    worth: re.Pattern[str] = FIGURES
    environment: Mapping[str, str] = field(default_factory=dict)
    absent: str = ""


def parts(device: str, results: Path, *, model: Path | None = None) -> list[Part]:
    """All of them, in the order in which they are run.

    Args:
        device: ``gpu:N``, or ``cpu``, on which everything is small.
        results: Where their JSON files go, in a folder of its own.
        model: A GGUF instead of the synthetic one.
    """
    on_gpu = device != "cpu"
    work = Path(os.environ.get("ORCHD_TEST_MODELS", results / "models")).resolve()
    small = work / "synthetic-135M-Q4_0.gguf"
    large = model or (work / "synthetic-8B-Q4_K-0.gguf" if on_gpu else work / "synthetic-135M-Q4_0.gguf")
    names = {path.stem: path for path in (small, large)}
    visible = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    alone = {**visible, "CUDA_VISIBLE_DEVICES": device.partition(":")[2]} if on_gpu else {}
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu/test_cublas.py"]
    pytest.append("tests/gpu/test_on_gpu.py")
    tested = {**visible, "ORCHD_TEST_DEVICE": device, "ORCHD_TEST_MODELS": str(work)}

    def written(name: str) -> Path:
        return (work / f"{name}.json").resolve()

    def speed(letter: str, path: Path, *, least_s: float, most_s: float) -> Part:
        name = f"{letter}-speed-{path.stem.removeprefix('synthetic-').partition('-')[0]}"
        command = [*python, "benchmarks.gpu", "--device", device, "--model", str(path), "--pairs", "1"]
        command += ["--json", str(written(name)), *([] if on_gpu else ["--quick", "--clients", "1", "8"])]
        return Part(
            name,
            f"{path.stem}: tokens/s beside llama-bench and llama-server, share of the memory's bandwidth",
            command,
            least_s,
            most_s,
            json=written(name),
            fine=(0, 1),
            environment=visible,
        )

    def row(name: str, *, peer: str = "llama-server", suffix: str = "") -> Part:
        full = f"d-{name}{suffix}"
        command = [*python, "benchmarks.compare", "--only", name, "--pairs", "1", "--quick", "--model", str(large)]
        command += ["--json", str(written(full)), "--peer", peer]
        there = any(scenario.name == name for scenario in SCENARIOS)
        return Part(
            full,
            f"{name} with {large.stem}, beside {peer}",
            command,
            least_s=20,
            most_s=75 if on_gpu else 120,
            json=written(full),
            environment=alone,
            absent="" if there else f"benchmarks.compare has no row {name}",
        )

    shapes = ["135M-Q4_0", *(["1B-Q4_K-0", "1B-Q4_K-1"] if on_gpu else [])]
    return [
        Part(
            "models",
            "writes the models that the next parts need",
            [*python, "benchmarks.gpu.models", str(work), *shapes, *(["8B-Q4_K-0"] if on_gpu and not model else [])],
            least_s=10,
            most_s=150,
            worth=re.compile(" GiB"),
        ),
        Part(
            "a-tests",
            "tests marked gpu, the quick ones",
            [*pytest, "-k", f"not ({SLOW_TESTS})"],
            20,
            150,
            worth=TESTS,
            environment=tested,
        ),
        Part(
            "a-tests-slow",
            "tests marked gpu, the others",
            [*pytest, "-k", SLOW_TESTS],
            30,
            90,
            worth=TESTS,
            environment=tested,
        ),
        *(
            speed("b", path, least_s=25, most_s=most_s)
            for path, most_s in ((names[large.stem], 150), (names[small.stem], 80))[: len(names)]
        ),
        row("conversations-12"),
        row("edit-1"),
        row("edit-1", peer=WITHOUT_GUESSES, suffix="-off"),
        row("json-8"),
        Part(
            "e-choices",
            f"three choices that were made on a CPU, on and off, with {large.stem}",
            [
                *python,
                "benchmarks.gpu.choices",
                str(large),
                "--device",
                device,
                "--json",
                str(written("e-choices")),
                *([] if on_gpu else ["--slots", "4", "--steps", "10"]),
            ],
            least_s=20,
            most_s=80,
            json=written("e-choices"),
            environment=visible,
        ),
    ]
