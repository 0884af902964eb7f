"""Loading and closing a model over and over leaves nothing behind."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

from engines.api import SamplingParams
from engines.llamacpp.vocab import LlamaVocab
from tests.engines.support import PROMPTS, exact, loaded, run, sequence, tokens_of

ROUNDS, SETTLED = 50, 10


def resident_kib() -> int:
    """What is in use, without what Python has yet to collect and the C library to give back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def one_round(path: Path) -> None:
    vocab = LlamaVocab(path)
    vocab.tokenize_chat([{"role": "user", "content": "Hello"}])
    vocab.close()
    prompts = [tokens_of(path, text) for text in PROMPTS[:4]]
    random = SamplingParams(repeat_penalty=1.1, ignore_eos=True)
    with loaded(exact(path, slots=4, batch=2048)) as model:
        run(model, *(sequence(prompt, 8, key=str(n), sampling=random) for n, prompt in enumerate(prompts)))
        model.admit(sequence(prompts[0], sampling=random))  # still running when it is closed
        model.step()


def test_fifty_rounds_leave_no_memory_threads_or_files(tiny_model_path: Path) -> None:
    """Without any one of the four ``llama_*_free`` it grows by 3 MiB at least (tried)."""
    for _ in range(SETTLED):
        one_round(tiny_model_path)
    memory, threads, files = resident_kib(), os.listdir("/proc/self/task"), len(os.listdir("/proc/self/fd"))
    for _ in range(SETTLED, ROUNDS):
        one_round(tiny_model_path)
    growth = resident_kib() - memory
    print(f"grew by {growth} KiB in {ROUNDS - SETTLED} rounds")
    assert growth < 1024
    assert len(os.listdir("/proc/self/task")) <= len(threads)
    assert len(os.listdir("/proc/self/fd")) <= files
