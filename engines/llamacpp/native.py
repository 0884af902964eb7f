"""The only file that imports ``llama_cpp``: handles with owners, and return codes turned into `engines.errors`.

Every handle has one owner at a time and is closed by it; a context is closed before its model. Names starting with
``n_`` are llama.cpp's own. Globals are llama.cpp's own too: its backend and its log callback, set up once on import.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from engines.api import ModelSpec
from engines.errors import DecodeFailed, EngineDead, LoadFailed
from engines.llamacpp.report import Buffers, load_error
from engines.llamacpp.threads import ComputeThreads

_log = logging.getLogger("engines.llamacpp")
_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}  # llama.cpp's info is our debug
_captures: dict[int, list[str]] = {}  # thread id -> lines that llama.cpp logged on it

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
LONG_STEP_S = 0.001
"""A step that takes as long is not made faster by leaving threads asleep."""
WORTH_WAKING = 1.5
"""How much faster than one thread all have to be: beside short steps an event loop needs a core of its own."""
REPEAT_WINDOW = 64
"""Tokens that a repeat penalty looks back over (llama.cpp's own default)."""


def _on_log(level: int, text: bytes, _user_data: object) -> None:
    line = text.decode("utf-8", "replace").rstrip()
    lines = _captures.get(threading.get_ident())
    if lines is not None:
        lines.append(line)
    if line and line != ".":
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)


_log_callback = llama_cpp.llama_log_callback(_on_log)  # must stay referenced
llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()

version: str = llama_cpp.__version__


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Collects what llama.cpp logs on this thread."""
    thread = threading.get_ident()
    lines = _captures[thread] = []
    try:
        yield lines
    finally:
        del _captures[thread]


class NativeModel:
    """Owner of a ``llama_model``: weights and vocabulary, or the vocabulary alone.

    Args:
        path: The GGUF file, or the first part of a split one.
        gpu: Ordinal of the GPU that holds every layer; None keeps all of it on the CPU.
        mmap: Map the file instead of reading it.
        repack: Copy weights into layouts that are faster on this CPU.
        vocab_only: Load no weights.
        no_alloc: Load no weights, and let contexts only add up what they would allocate.
        on_progress: Called with 0.0 to 1.0 on this thread. What it raises ends the loading and is raised from here.

    Raises:
        LoadFailed: The file is not a model that llama.cpp can load.
        OutOfDeviceMemory: Its weights do not fit.
    """

    def __init__(
        self,
        path: Path,
        *,
        gpu: int | None = None,
        mmap: bool = True,
        repack: bool = True,
        vocab_only: bool = False,
        no_alloc: bool = False,
        on_progress: Any = None,
    ) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0 if gpu is None else -1
        params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
        params.main_gpu = -1 if gpu is None else gpu
        mapped = mmap and not no_alloc  # llama.cpp aborts if asked for both
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP if mapped else llama_cpp.LLAMA_LOAD_MODE_NONE
        params.use_extra_bufts = repack
        params.no_alloc = no_alloc
        params.vocab_only = vocab_only

        raised: list[BaseException] = []  # an exception cannot pass through llama.cpp

        def progress(share: float, _user_data: object) -> bool:
            try:
                if on_progress is not None:
                    on_progress(share)
            except BaseException as error:
                raised.append(error)
            return not raised

        callback = params.progress_callback = llama_cpp.llama_progress_callback(progress)
        with _captured() as lines:
            handle = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        del callback  # it had to stay referenced until here
        if raised:
            if handle:
                llama_cpp.llama_model_free(handle)
            raise raised[0]
        if not handle:
            raise load_error(path.name, lines)
        self._handle: Any = handle
        self.name = path.name
        self.buffers = Buffers(lines)
        self._vocab: Any = llama_cpp.llama_model_get_vocab(handle)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.n_swa: int = 0 if vocab_only else llama_cpp.llama_model_n_swa(handle)
        self.is_recurrent: bool = not vocab_only and (
            llama_cpp.llama_model_is_recurrent(handle) or llama_cpp.llama_model_is_hybrid(handle)
        )

    @property
    def handle(self) -> Any:
        """The pointer. Raises `EngineDead` once closed."""
        if self._handle is None:
            raise EngineDead(f"{self.name} is closed")
        return self._handle

    @property
    def vocab(self) -> Any:
        """The pointer to the vocabulary, which is a part of the model. Raises `EngineDead` once closed."""
        return self.handle and self._vocab

    @property
    def generates(self) -> bool:
        """Whether the model continues text, and needs no encoder for it."""
        decodes = llama_cpp.llama_model_has_decoder(self.handle) and not llama_cpp.llama_model_has_encoder(self.handle)
        return bool(decodes) and not llama_cpp.llama_model_is_diffusion(self.handle)

    @property
    def chat_template(self) -> str | None:
        """The Jinja source in the file's metadata."""
        template = llama_cpp.llama_model_chat_template(self.handle, None)
        return template.decode("utf-8", "replace") if template else None

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text. ``llama_tokenize`` is thread-safe."""
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special)
        if n < 0:  # -n is the room it needs
            tokens = (llama_cpp.llama_token * -n)()
            n = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, -n, add_special, parse_special)
        return tokens[:n]

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes a token stands for; control tokens are empty unless ``special``."""
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:n]

    def is_control(self, token: int) -> bool:
        """Whether a token steers the model instead of standing for text."""
        attributes = llama_cpp.llama_vocab_get_attr(self.vocab, token)
        return bool(attributes & (llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN))

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    @property
    def bos(self) -> int:
        """The beginning-of-sequence token, -1 if there is none."""
        return int(llama_cpp.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int:
        """The end-of-sequence token, -1 if there is none."""
        return int(llama_cpp.llama_vocab_eos(self.vocab))

    def close(self) -> None:
        """Free the model. Its contexts are closed already. Calling it again does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            llama_cpp.llama_model_free(handle)


class NativeContext:
    """Owner of a ``llama_context`` with one KV stream per slot, and of the batch it is fed with.

    Raises:
        LoadFailed: llama.cpp refuses the parameters.
        OutOfDeviceMemory: KV cache or compute buffers do not fit.
    """

    def __init__(self, model: NativeModel, spec: ModelSpec, *, threads: int, cpus: Sequence[int] = ()) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = spec.slots * spec.ctx
        params.n_batch = params.n_ubatch = max(spec.batch, spec.slots)
        params.n_seq_max = spec.slots
        params.n_outputs_max = spec.slots
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH_ATTN[spec.flash_attn]
        params.type_k = CACHE_TYPES[spec.cache_type_k]
        params.type_v = CACHE_TYPES[spec.cache_type_v]
        params.swa_full = spec.swa_full
        params.kv_unified = False  # no slot can use up another's cells
        params.no_perf = True
        with _captured() as lines:
            handle = llama_cpp.llama_init_from_model(model.handle, params)
        if not handle:
            raise load_error(f"a context of {spec.slots} slots x {spec.ctx} tokens for {model.name}", lines)
        if not llama_cpp.llama_get_memory(handle):  # an encoder: nothing to continue from
            llama_cpp.llama_free(handle)
            raise LoadFailed(f"{model.name} does not generate text (an embedding or encoder model)")
        self._handle: Any = handle
        self._name = model.name
        self._n_vocab = model.n_vocab
        self.buffers = Buffers(lines)
        self.n_rows = int(llama_cpp.llama_n_batch(handle))
        try:
            self._make_batch()
            self._threads = ComputeThreads(handle, threads, cpus)
        except BaseException:
            llama_cpp.llama_free(handle)
            raise
        self._lone_rows = 0  # most rows that one thread computes faster than all of them

    def _make_batch(self) -> None:
        self._batch = llama_cpp.llama_batch_init(self.n_rows, 0, 1)
        self.token = _view(self._batch.token, self.n_rows, np.int32)
        self.pos = _view(self._batch.pos, self.n_rows, np.int32)
        self.output = _view(self._batch.logits, self.n_rows, np.int8)
        self.seq = np.zeros(self.n_rows, np.int32)  # row r's slot; the batch's pointers lead here, once and for all
        for row in range(self.n_rows):
            self._batch.n_seq_id[row] = 1
        self._own_seq_ids = self._swap_seq_ids()

    def _swap_seq_ids(self) -> list[Any]:
        """Point ``batch.seq_id[row]`` into `seq`; returns llama.cpp's own pointers, which `close` puts back."""
        slots = ctypes.cast(self._batch.seq_id, ctypes.POINTER(ctypes.c_void_p))
        own = [slots[row] for row in range(self.n_rows)]
        for row in range(self.n_rows):
            slots[row] = self.seq.ctypes.data + row * self.seq.itemsize
        return own

    @property
    def handle(self) -> Any:
        """The pointer. Raises `EngineDead` once closed."""
        if self._handle is None:
            raise EngineDead(f"the context of {self._name} is closed")
        return self._handle

    @property
    def _memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.handle)

    def decode(self, n_rows: int) -> None:
        """Run the first rows of `token`, `pos`, `seq`, `output` through the model. Raises `DecodeFailed`."""
        self._batch.n_tokens = n_rows
        self._threads.use(1 if n_rows <= self._lone_rows else self._threads.count)
        code = llama_cpp.llama_decode(self.handle, self._batch)
        llama_cpp.llama_synchronize(self.handle)  # a GPU may still be at work, and a step's time is measured
        if code == 0:
            return
        reason = {1: "no room in the KV cache", 2: "it was aborted", -1: "the batch was refused"}.get(
            code, "fatal error"
        )
        raise DecodeFailed(f"llama_decode returned {code}: {reason}")

    def logits(self, n_outputs: int) -> npt.NDArray[np.float32]:
        """Logits of the last decode's output rows in batch order, shape (n_outputs, n_vocab); valid until the next."""
        pointer = llama_cpp.llama_get_logits(self.handle)
        return _view(pointer, n_outputs * self._n_vocab, np.float32).reshape(n_outputs, self._n_vocab)

    def keep(self, slot: int, n_tokens: int) -> bool:
        """Cut a slot's cache to its first tokens; False if this memory cannot, and then nothing is certain about it."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, n_tokens, -1))

    def clear_slot(self, slot: int) -> None:
        """Empty one slot's cache."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def copy_slot(self, source: int, target: int) -> None:
        """Replace a slot's cache by a copy of another's; done on the device, before the next decode."""
        self.clear_slot(target)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def first_pos(self, slot: int) -> int:
        """The lowest position that a slot's cache still holds in every layer, -1 if there is none."""
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))

    def try_step(self, token: int, rows: int = 1) -> None:
        """Decode a token some times and forget it: pages in the weights and shows that a step works.

        Raises:
            DecodeFailed: It does not.
        """
        self.token[:rows], self.pos[:rows], self.seq[:rows] = token, np.arange(rows), 0
        self.output[:rows] = 0
        self.output[rows - 1] = 1
        self.decode(rows)
        if not np.isfinite(self.logits(1)).all():
            raise DecodeFailed("the model computes NaN or infinity instead of logits; its file may be damaged")
        self.clear()

    def choose_threads(self, n_slots: int) -> None:
        """Find out for small steps whether waking the other threads is worth it; with tiny models it is not."""
        lone_rows = 0
        for rows in (1, n_slots) if self._threads.count > 1 else ():
            if min(self._step_s(rows, lone_rows=0) for _ in range(4)) > LONG_STEP_S:
                break
            pairs = [(self._step_s(rows, lone_rows=0), self._step_s(rows, lone_rows=rows)) for _ in range(8)]
            together_s, alone_s = map(min, zip(*pairs, strict=True))
            if alone_s > together_s * WORTH_WAKING:
                break
            lone_rows = rows
        self._lone_rows = lone_rows

    def _step_s(self, rows: int, *, lone_rows: int) -> float:
        """Seconds of a step with one row in each slot, of a token that was decoded before."""
        self._lone_rows = lone_rows
        self.token[:rows], self.pos[:rows], self.output[:rows] = self.token[0], 0, 1
        self.seq[:rows] = np.arange(rows)
        began_s = time.perf_counter()
        self.decode(rows)
        seconds = time.perf_counter() - began_s
        self.clear()
        return seconds

    def clear(self) -> None:
        """Empty every slot."""
        llama_cpp.llama_memory_clear(self._memory, True)

    def sample(self, sampler: NativeSampler, row: int) -> int:
        """The next token after a row of the last batch; the sampler takes note of it."""
        return int(llama_cpp.llama_sampler_sample(sampler.handle, self.handle, row))

    def close(self) -> None:
        """Free context and batch. Calling it again does nothing."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        slots = ctypes.cast(self._batch.seq_id, ctypes.POINTER(ctypes.c_void_p))
        for row, pointer in enumerate(self._own_seq_ids):
            slots[row] = pointer
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(handle)
        self._threads.close()


class NativeSampler:
    """Owner of a sampler chain. Adding a link hands it over to the chain."""

    def __init__(self, n_vocab: int) -> None:
        params = llama_cpp.llama_sampler_chain_default_params()
        params.no_perf = True
        self._n_vocab = n_vocab
        self.handle: Any = llama_cpp.llama_sampler_chain_init(params)

    def _add(self, link: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self.handle, link)

    def forbid(self, tokens: Sequence[int]) -> None:
        """Never choose these tokens."""
        biases = (llama_cpp.llama_logit_bias * len(tokens))()
        for bias, token in zip(biases, tokens, strict=True):
            bias.token, bias.bias = token, float("-inf")
        self._add(llama_cpp.llama_sampler_init_logit_bias(self._n_vocab, len(tokens), biases))

    def penalize_repeats(self, penalty: float, prompt: Sequence[int]) -> None:
        """Divide the logits of tokens among the last `REPEAT_WINDOW`, the prompt's included."""
        link = llama_cpp.llama_sampler_init_penalties(self._n_vocab, REPEAT_WINDOW, penalty, 0.0, 0.0)
        for token in prompt[-REPEAT_WINDOW:]:
            llama_cpp.llama_sampler_accept(link, token)
        self._add(link)

    def greedy(self) -> None:
        """End of the chain: the most likely token."""
        self._add(llama_cpp.llama_sampler_init_greedy())

    def random(self, *, top_k: int, top_p: float, min_p: float, temperature: float, seed: int) -> None:
        """End of the chain: a random token, in llama.cpp's usual order of filters."""
        if top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(top_k))
        self._add(llama_cpp.llama_sampler_init_top_p(top_p, 1))
        self._add(llama_cpp.llama_sampler_init_min_p(min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(temperature))
        self._add(llama_cpp.llama_sampler_init_dist(seed % llama_cpp.LLAMA_DEFAULT_SEED))  # which means: draw a seed

    def close(self) -> None:
        """Free the chain. Calling it again does nothing."""
        handle, self.handle = self.handle, None
        if handle is not None:
            llama_cpp.llama_sampler_free(handle)


def _view(pointer: Any, n: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A numpy array over memory that llama.cpp owns."""
    kind = pointer._type_ * n
    return np.frombuffer(memoryview(kind.from_address(ctypes.addressof(pointer.contents))), dtype)
