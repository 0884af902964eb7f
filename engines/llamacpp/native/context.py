"""A context: the KV caches of a model's slots, the batch they are fed with, and the logits that come of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from engines.api import ModelSpec
from engines.errors import DecodeFailed, EngineDead, LoadFailed
from engines.llamacpp.load_log import Buffers, load_error
from engines.llamacpp.native.heartbeat import Heartbeat
from engines.llamacpp.native.library import captured, keeping_lock
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.native.threads import ComputeThreads

_get_logits = keeping_lock("llama_get_logits", [ctypes.c_void_p], ctypes.POINTER(ctypes.c_float))

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}
GUESSES = 32
"""Rows of guessed tokens in a step, at most: their logits take memory."""
HELD_COST = 3
"""How many times as much a token costs that is copied by itself, through host memory, as with its whole slot."""
COPY_BYTES = 256 << 20
"""Most host memory that a copy passes through."""
KEPT_BYTES = 16 << 20
"""Most of it that is kept for the next one."""


class NativeContext:
    """Owner of a ``llama_context`` with one KV stream per slot, and of the batch it is fed with.

    Args:
        model: What it computes with.
        spec: Slots, sizes and data types.
        threads: Compute threads on the host.
        cpus: See `engines.api.DeviceSpec`.
        copies_held: Whether what a slot holds may be copied by itself.

    Attributes:
        buffers: Memory that it takes.
        n_rows: Of a step, at most.
        n_guesses: Of these, guessed tokens at most, besides a row of each slot.
        n_threads: Compute threads.
        lone_rows: Steps of so many rows are left to one of them.

    Raises:
        LoadFailed: llama.cpp refuses the parameters.
        OutOfDeviceMemory: KV cache or compute buffers do not fit.
    """

    def __init__(
        self, model: NativeModel, spec: ModelSpec, *, threads: int, cpus: Sequence[int] = (), copies_held: bool = True
    ) -> None:
        params = _params(spec, threads)
        self.n_guesses = min(GUESSES, params.n_batch - spec.slots) if spec.speculate and model.can_go_back else 0
        params.n_outputs_max = spec.slots + self.n_guesses if model.selects_outputs else params.n_batch
        self.heartbeat = Heartbeat()
        params.abort_callback, params.abort_callback_data = self.heartbeat.callback, self.heartbeat.address
        with captured() as lines:
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
        self.lone_rows = 0
        self.n_threads = threads
        self._ctx = spec.ctx
        # With a sliding window the state of a sequence is not all of its cache.
        self._copies_held = copies_held and not (model.n_swa or model.is_recurrent)
        self._selects_outputs = model.selects_outputs
        self._queued: set[int] = set()  # slots that the next decode copies from or to
        self._passage = np.empty(0, np.uint8)
        try:
            self._make_batch()
            self._threads = ComputeThreads(handle, threads, cpus)
        except BaseException:
            llama_cpp.llama_free(handle)
            raise
        self._logits_of = 0, 0  # address and outputs of `_logits`
        self._logits: npt.NDArray[np.float32]

    def _make_batch(self) -> None:
        self._batch = llama_cpp.llama_batch_init(self.n_rows, 0, 1)
        self.token = _view(self._batch.token, self.n_rows, np.int32)
        self.pos = _view(self._batch.pos, self.n_rows, np.int32)
        self.output = _view(self._batch.logits, self.n_rows, np.int8)
        self._outputs: npt.NDArray[np.intp] | None = None  # rows asked for, where all are computed
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
        if not self._selects_outputs:
            self._outputs = np.flatnonzero(self.output[:n_rows])
            self.output[:n_rows] = 1
        self.heartbeat.begin()
        self._threads.use(1 if n_rows <= self.lone_rows else self.n_threads)
        self._queued.clear()
        code = llama_cpp.llama_decode(self.handle, self._batch)
        if self.buffers.on_device:
            llama_cpp.llama_synchronize(self.handle)  # a GPU may still be at work, and a step's time is measured
        if code == 0:
            return
        reason = {1: "no room in the KV cache", 2: "it was aborted", -1: "the batch was refused"}.get(
            code, "fatal error"
        )
        raise DecodeFailed(f"llama_decode returned {code}: {reason}")

    def logits(self, n_outputs: int) -> npt.NDArray[np.float32]:
        """Logits of the last decode's output rows in batch order, shape (n_outputs, n_vocab); valid until the next."""
        pointer = _get_logits(self.handle)
        if self._outputs is not None:
            rows = self._batch.n_tokens
            return _view(pointer, rows * self._n_vocab, np.float32).reshape(rows, self._n_vocab)[self._outputs]
        where = ctypes.addressof(pointer.contents), n_outputs
        if where != self._logits_of:  # nearly always those of the step before
            view = _view(pointer, n_outputs * self._n_vocab, np.float32)
            self._logits, self._logits_of = view.reshape(n_outputs, self._n_vocab), where
        return self._logits

    def keep(self, slot: int, n_tokens: int) -> bool:
        """Cut a slot's cache to its first tokens; False if this memory cannot, and then nothing is certain about it."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, slot, n_tokens, -1))

    def clear_slot(self, slot: int) -> None:
        """Empty one slot's cache."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def copies_held(self, tokens: int) -> bool:
        """Whether a copy of so many tokens would copy only these; it copies all that a slot has room for otherwise."""
        return self._copies_held and tokens * HELD_COST <= self._ctx

    def copy_slot(self, source: int, target: int, tokens: int) -> bool:
        """Replace a slot's cache by a copy of another's, which holds so many tokens.

        llama.cpp copies whole slots, on the device, at the beginning of the next decode. Until then, nothing else may
        be copied by another way: it would see what was there before.

        Returns:
            True if the copy is made; False if the next decode makes it.
        """
        if self.copies_held(tokens) and not self._queued and self._copy_held(source, target):
            return True
        self.overwrite_slot(source, target)
        return False

    def overwrite_slot(self, source: int, target: int) -> None:
        """Queue a copy of every cell of a slot, held or not; the next decode makes it."""
        self.clear_slot(target)
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self._queued |= {source, target}

    def is_queued(self, slot: int) -> bool:
        """Whether the next decode copies from or to a slot; until then it can be neither saved nor restored."""
        return slot in self._queued

    def state_bytes(self, slot: int) -> int:
        """Bytes that `save_slot` would return; 0 if it cannot now."""
        return 0 if self.is_queued(slot) else int(llama_cpp.llama_state_seq_get_size(self.handle, slot))

    def save_slot(self, slot: int, n_bytes: int) -> npt.NDArray[np.uint8] | None:
        """A copy in host memory of what a slot holds, in llama.cpp's format; None if it cannot be made.

        Args:
            slot: Which.
            n_bytes: From `state_bytes`.

        Raises:
            MemoryError: The system has not so much.
        """
        state = np.empty(n_bytes, np.uint8)
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(llama_cpp.llama_state_seq_get_data(self.handle, data, n_bytes, slot))
        return state if written == n_bytes else None

    def restore_slot(self, slot: int, state: npt.NDArray[np.uint8]) -> bool:
        """Replace what a slot holds by what `save_slot` returned; if that fails, the slot is empty and it is False."""
        data = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self.clear_slot(slot)
        if int(llama_cpp.llama_state_seq_set_data(self.handle, data, state.nbytes, slot)) == state.nbytes:
            return True
        self.clear_slot(slot)
        return False

    def _copy_held(self, source: int, target: int) -> bool:
        """Copy what a slot holds through host memory; False if that cannot be done, and the target is empty then."""
        n_bytes = int(llama_cpp.llama_state_seq_get_size(self.handle, source))
        if not 0 < n_bytes <= COPY_BYTES:
            return False
        try:
            passage = self._passage if self._passage.size >= n_bytes else np.empty(n_bytes, np.uint8)
        except MemoryError:
            return False
        if n_bytes <= KEPT_BYTES:
            self._passage = passage
        data = passage.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = int(llama_cpp.llama_state_seq_get_data(self.handle, data, n_bytes, source))
        if written and int(llama_cpp.llama_state_seq_set_data(self.handle, data, written, target)) == written:
            return True
        self._copies_held = False  # nor will the next one
        return False

    def first_pos(self, slot: int) -> int:
        """The lowest position that a slot's cache still holds in every layer, -1 if there is none."""
        return int(llama_cpp.llama_memory_seq_pos_min(self._memory, slot))

    def clear(self, *, wipe: bool = True) -> None:
        """Empty every slot; ``wipe`` also overwrites what they held, which takes a tenth of a second for 500 MB."""
        llama_cpp.llama_memory_clear(self._memory, wipe)

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


def _params(spec: ModelSpec, threads: int) -> Any:
    """Of a context in this shape, but for how many rows' logits it may be asked for."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = spec.slots * spec.ctx
    # A multiple of the slots: of other numbers llama.cpp makes no graph for some models (Kimi Linear), but aborts.
    params.n_batch = params.n_ubatch = max(spec.batch - spec.batch % spec.slots, spec.slots)
    params.n_seq_max = spec.slots
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = FLASH_ATTN[spec.flash_attn]
    params.type_k = CACHE_TYPES[spec.cache_type_k]
    params.type_v = CACHE_TYPES[spec.cache_type_v]
    params.swa_full = spec.swa_full
    params.kv_unified = False  # no slot can use up another's cells
    params.no_perf = True
    return params


def _view(pointer: Any, n: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
    """A numpy array over memory that llama.cpp owns."""
    kind = pointer._type_ * n
    return np.frombuffer(memoryview(kind.from_address(ctypes.addressof(pointer.contents))), dtype)
