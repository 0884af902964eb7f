"""A model's weights and vocabulary."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from engines.errors import EngineDead
from engines.llamacpp.load_log import Buffers, load_error
from engines.llamacpp.native.library import captured, keeping_lock

_token_to_piece = keeping_lock(
    "llama_token_to_piece",
    [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool],
    ctypes.c_int32,
)
_attributes_of = keeping_lock("llama_vocab_get_attr", [ctypes.c_void_p, ctypes.c_int32], ctypes.c_int)
_is_end = keeping_lock("llama_vocab_is_eog", [ctypes.c_void_p, ctypes.c_int32], ctypes.c_bool)
_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_SPECIAL = _CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED


class NativeModel:
    """Owner of a ``llama_model``: weights and vocabulary, or the vocabulary alone.

    Args:
        path: The GGUF file, or the first part of a split one.
        gpu: Index in llama.cpp's list of the GPU that holds every layer; None keeps all of it on the CPU.
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
        with captured() as lines:
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
        # Its `seq_rm` empties at once what its `seq_cp` only copies in the next decode.
        self.survives_moves: bool = vocab_only or self.architecture != "deepseek4"
        # llama.cpp writes its states beside their cells, and aborts, where the first slot is idle and two others work.
        self.most_slots: int | None = None if vocab_only or self.architecture != "plamo2" else 2
        # Its graph computes logits of all rows, and llama.cpp hands out the first of them instead of those asked for.
        self.selects_outputs: bool = vocab_only or self.architecture != "cogvlm"
        self.is_recurrent: bool = not vocab_only and (
            llama_cpp.llama_model_is_recurrent(handle) or llama_cpp.llama_model_is_hybrid(handle)
        )

    @property
    def can_go_back(self) -> bool:
        """Whether its memory can forget the last tokens of a sequence."""
        return self.survives_moves and not self.is_recurrent

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

    @property
    def pre_tokenizer(self) -> str:
        """What the file's metadata calls the rules by which texts are cut into words."""
        return self._metadata("tokenizer.ggml.pre")

    @property
    def architecture(self) -> str:
        """llama.cpp's name for it."""
        return self._metadata("general.architecture")

    def _metadata(self, key: str) -> str:
        """A short value in the file's metadata; empty if it is not there."""
        buffer = ctypes.create_string_buffer(64)
        llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def heads(self) -> tuple[int, int, int, int]:
        """Of the first layer's attention: sizes of a K and of a V head, heads, KV heads; all 0 if it has none."""
        heads, kv_heads = llama_cpp.llama_model_n_head(self.handle), llama_cpp.llama_model_n_head_kv(self.handle)
        if not heads or not kv_heads:
            return 0, 0, 0, 0
        usual = llama_cpp.llama_model_n_embd(self.handle) // heads
        prefix = f"{self.architecture}.attention"
        k, v = (self._metadata(f"{prefix}.{what}_length") for what in ("key", "value"))
        return int(k) if k.isdigit() else usual, int(v) if v.isdigit() else usual, heads, kv_heads

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text. ``llama_tokenize`` is thread-safe."""
        data = text.encode("utf-8")
        room = len(data) + 8
        tokens = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special)
        if n < 0:  # -n is the room it needs
            tokens = (llama_cpp.llama_token * -n)()
            n = llama_cpp.llama_tokenize(self.vocab, data, len(data), tokens, -n, add_special, parse_special)
        return tokens[:n]

    def text(self, token: int) -> str:
        """How the vocabulary writes a token, which is what spells a special one; nothing for -1, which is none."""
        return llama_cpp.llama_vocab_get_text(self.vocab, token).decode("utf-8", "replace") if token >= 0 else ""

    @property
    def is_bpe(self) -> bool:
        """Whether regular expressions cut texts into words before these are looked up."""
        return bool(llama_cpp.llama_vocab_type(self.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE)

    @property
    def is_sentencepiece(self) -> bool:
        """Whether tokens are merged from characters across the whole text."""
        return bool(llama_cpp.llama_vocab_type(self.vocab) == llama_cpp.LLAMA_VOCAB_TYPE_SPM)

    def piece(self, token: int, *, special: bool) -> bytes:
        """The bytes a token stands for; control tokens are empty unless ``special``."""
        buffer = ctypes.create_string_buffer(64)
        n = _token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = _token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:n]

    def pieces(self) -> list[bytes]:
        """The bytes of every token, control tokens as they are spelled: as `piece`, in a fraction of the time."""
        vocab, buffer = self.vocab, ctypes.create_string_buffer(64)
        bytes_of = memoryview(buffer)
        sizes = ((token, _token_to_piece(vocab, token, buffer, 64, 0, True)) for token in range(self.n_vocab))
        return [bytes(bytes_of[:size]) if size >= 0 else self.piece(token, special=True) for token, size in sizes]

    @functools.cached_property
    def _attributes(self) -> npt.NDArray[np.int32]:
        """Of every token, asked for once: a vocabulary has up to some 260,000, and each question takes time."""
        vocab = self.vocab
        return np.fromiter((_attributes_of(vocab, token) for token in range(self.n_vocab)), np.int32, self.n_vocab)

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends the generation."""
        vocab = self.vocab
        return tuple(token for token in range(self.n_vocab) if _is_end(vocab, token))

    @property
    def controls(self) -> list[int]:
        """Every token that steers the model instead of standing for text."""
        return self._with(_CONTROL)

    @property
    def specials(self) -> list[int]:
        """Every token that a text which spells it always becomes."""
        return self._with(_SPECIAL)

    def _with(self, attributes: int) -> list[int]:
        return [int(token) for token in np.flatnonzero(self._attributes & attributes)]

    def is_control(self, token: int) -> bool:
        """Whether a token steers the model instead of standing for text."""
        return bool(_attributes_of(self.vocab, token) & _CONTROL)

    def is_unknown(self, token: int) -> bool:
        """Whether a token stands for all that has none."""
        return bool(_attributes_of(self.vocab, token) & llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN)

    def is_special(self, token: int) -> bool:
        """Whether a text that spells the token always becomes it."""
        return bool(_attributes_of(self.vocab, token) & _SPECIAL)

    def has_token(self, text: str) -> bool:
        """Whether a text is one token that always stands for it, and that no other text is made into."""
        tokens = self.tokenize(text)
        return len(tokens) == 1 and self.is_special(tokens[0]) and self.text(tokens[0]) == text

    def swallows_blanks(self, token: int) -> bool:
        """Whether a special token takes the blanks behind it away."""
        return bool(llama_cpp.llama_vocab_get_attr(self.vocab, token) & llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP)

    @property
    def adds_bos(self) -> bool:
        """Whether a prompt should begin with the beginning-of-sequence token."""
        return bool(llama_cpp.llama_vocab_get_add_bos(self.vocab))

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
