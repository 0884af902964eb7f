"""Compiles a JSON Schema in a process that may die, so that the one that serves does not.

``python -m engines.llamacpp.schema_vet`` reads a schema and prints why it cannot be used, or nothing. A schema may take
any time and memory to compile, and references that lead far enough overflow the stack: that ends only this process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from engines.errors import InvalidSchema
from engines.llamacpp.json_schema import compiled
from engines.llamacpp.native.guidance import GuidanceTokenizer

CPU_S = 2
"""Processor time that it may take, Python's start included."""

TIME_LIMIT_S = 20.0
"""How long that may take beside other work, and then the compilation with a model's vocabulary."""

MEMORY_BYTES = 1 << 30
"""Address space, with all that Python and numpy map."""

STACK_BYTES = 2 << 20
"""A quarter of what the thread has that compiles it to be used."""


def vet(schema: Mapping[str, Any]) -> None:
    """Raise `InvalidSchema` if a schema cannot be used, or takes too much to find out."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "engines.llamacpp.schema_vet"],
            input=json.dumps(schema).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={
                "PYTHONPATH": os.pathsep.join(os.path.abspath(folder) for folder in sys.path),
                "OPENBLAS_NUM_THREADS": "1",
            },
            timeout=TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise too_much() from None
    except OSError as error:
        raise InvalidSchema(f"#: no process could be started to check the schema ({error.strerror})") from None
    if done.returncode:
        raise too_much()
    if done.stdout:
        raise InvalidSchema(done.stdout.decode("utf-8", "replace"))


def too_much() -> InvalidSchema:
    """The refusal of a schema that would never be done."""
    return InvalidSchema("#: the schema takes too much time or memory to compile; make it simpler")


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    schema = json.load(sys.stdin.buffer)
    answers: list[str] = []

    def work() -> None:
        alphabet = [bytes([byte]) for byte in range(256)]
        try:
            compiled(schema, GuidanceTokenizer([*alphabet, b"\xffend"], ends=[256]))
        except InvalidSchema as error:
            answers.append(str(error))

    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    sys.stdout.buffer.write("".join(answers).encode())


if __name__ == "__main__":
    _main()
