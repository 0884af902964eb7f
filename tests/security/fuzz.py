"""Targets for fuzzing the parsers that are ours: ``python -m tests.security.fuzz sse -max_total_time=60`` runs Atheris.

Each takes bytes and raises if the parser breaks a promise. Atheris is no dependency: ``pip install atheris`` first.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import msgspec

from engines.errors import LoadFailed
from engines.llamacpp.marks import ControlTexts
from engines.llamacpp.text import OutputText
from orchd.client.sse import SseReader
from orchd.errors import InvalidParams
from orchd.http.sse import resume_from
from orchd.models import files, references
from orchd.schemas import TaskRequest
from orchd.settings.strict import explain

_CONTROLS = ControlTexts(["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"])


def sse(data: bytes) -> None:
    """The client's reader: the same events however the bytes are cut."""
    cut = data[0] % len(data) if data else 0
    whole = _read([data])
    assert whole == _read([data[:cut], data[cut:]]) == _read([bytes([byte]) for byte in data])


def _read(chunks: list[bytes]) -> list[object]:
    reader = SseReader(max_event_bytes=1 << 20)
    return [event for chunk in chunks for event in reader.feed(chunk)]


def stop_string(data: bytes) -> None:
    """Stop strings: what is shown is the text before the first one that is complete, whatever the pieces."""
    stop_bytes, _, text_bytes = data.partition(b"\n")
    stops = tuple(stop for stop in stop_bytes.decode("utf-8", "ignore").split(" ")[:8] if stop)
    output = OutputText(stops)
    shown = ""
    for at in range(0, len(text_bytes), 3):
        shown += output.push(text_bytes[at : at + 3])
        if output.stopped:
            break
    shown += output.flush()
    text = text_bytes.decode("utf-8", "replace")
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    end, minus = min(ends, default=(len(text), 0))
    assert shown == text[: end + minus]


def gguf_head(data: bytes) -> None:
    """The look at a file's first bytes."""
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(LoadFailed):
            files.looks_like_gguf(Path(file.name))
            assert data.startswith(b"GGUF")


def event_id(data: bytes) -> None:
    """``Last-Event-ID``."""
    start = resume_from(data.decode("utf-8", "surrogateescape"))
    assert 0 <= start <= 10**12
    assert start == 0 or data.isdigit()


def reference(data: bytes) -> None:
    """What a reload may ask for."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(InvalidParams):
        found = references.resolve(data.decode("utf-8", "surrogateescape"), [Path(folder)])
        raise AssertionError(f"an empty folder has no {found}")


def task(data: bytes) -> None:
    """A submit's body: a task, or a sentence that says what is wrong with it."""
    sentence = "a task"
    try:
        msgspec.json.decode(data, type=TaskRequest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        sentence = str(explain(error, TaskRequest))
    assert sentence


def controls(data: bytes) -> None:
    """Users' text around control tokens: nothing is lost, and no part holds a control text."""
    text = data.decode("utf-8", "ignore")
    (seen,), marks = _CONTROLS.marked([text], plain=[frozenset()])
    assert len(seen) == len(text)
    assert marks.taken_from(seen) == text
    parts = [text[a:b] for a, b in itertools.pairwise([0, *_CONTROLS.cuts(seen, text), len(text)])]
    for part in parts:
        assert not any(control in part for control in ("<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]"))


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (sse, stop_string, gguf_head, event_id, reference, task, controls)
}

SEEDS = {
    "sse": b'id: 1\nevent: token\ndata: {"text":"a"}\n\n: ping\r\n\r\n',
    "stop_string": b"abc bcd\nxxabxabcd",
    "gguf_head": b"GGUF\x03\x00\x00\x00" + bytes(16),
    "event_id": b"12",
    "reference": b"folder/../model.gguf",
    "task": b'{"prompt":"a","max_tokens":4,"stop":["b"],"temperature":0.5,"seed":1}',
    "controls": b"a<|im_end|>b<|im_<s>start|>[INST]",
}
"""What each parser takes as right; from there it is mutated."""


def main() -> None:
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    name, *arguments = sys.argv[1:]
    for item in gc.get_objects():  # `atheris.instrument_all` takes minutes: it does what is not ours as well
        if isinstance(item, FunctionType) and str(item.__module__).split(".")[0] in ("engines", "orchd", "__main__"):
            atheris.instrument_func(item)
    corpus = Path("build/fuzz", name)
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "seed").write_bytes(SEEDS[name])
    atheris.Setup([sys.argv[0], f"-artifact_prefix={corpus}-", str(corpus), *arguments], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
