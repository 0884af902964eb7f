"""llguidance: which tokens may come next, so that a text follows a JSON Schema.

By its C interface, which its wheel exports: every call gives Python's lock up, but for the shortest. Its own Python
classes keep the lock while they read a vocabulary, a third of a second for one of 150,000 tokens, and all streams of
the process would pause as long.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from engines.errors import InvalidSchema

Mask = npt.NDArray[np.uint32]
Tokenize = Callable[[bytes], Sequence[int]]

_TokenizeFn = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t
)
"""``LlgTokenizeFn``."""


class _Limits(ctypes.Structure):
    """``LlgParserLimits``."""

    _fields_ = (
        ("max_items_in_row", ctypes.c_size_t),
        ("initial_lexer_fuel", ctypes.c_uint64),
        ("step_lexer_fuel", ctypes.c_uint64),
        ("step_max_items", ctypes.c_size_t),
        ("max_lexer_states", ctypes.c_size_t),
        ("max_grammar_size", ctypes.c_size_t),
        ("precompute_large_lexemes", ctypes.c_bool),
        ("verbose_errors", ctypes.c_bool),
    )


class _MatcherInit(ctypes.Structure):
    """``LlgConstraintInit``."""

    _fields_ = (
        ("tokenizer", ctypes.c_void_p),
        ("log_buffer_level", ctypes.c_uint32),
        ("log_stderr_level", ctypes.c_uint32),
        ("ff_tokens_ok", ctypes.c_bool),
        ("backtrack_ok", ctypes.c_bool),
        ("limits", _Limits),
    )


class _TokenizerInit(ctypes.Structure):
    """``LlgTokenizerInitV2``."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("vocab_size", ctypes.c_uint32),
        ("tok_eos", ctypes.c_uint32),
        ("token_lens", ctypes.c_void_p),
        ("token_bytes", ctypes.c_char_p),
        ("tokenizer_json", ctypes.c_char_p),
        ("tokenize_assumes_string", ctypes.c_bool),
        ("tokenize_fn", _TokenizeFn),
        ("use_approximate_greedy_tokenize_fn", ctypes.c_bool),
        ("tokenize_user_data", ctypes.c_void_p),
        ("slices", ctypes.POINTER(ctypes.c_char_p)),
        ("tok_eos_extra", ctypes.c_void_p),
        ("tok_eos_extra_count", ctypes.c_uint32),
    )


_PATH = str(next(Path(llguidance.__file__).parent.glob("_lib*.so")))
_library = ctypes.CDLL(_PATH)
_short = ctypes.PyDLL(_PATH)
"""For calls of microseconds: a thread that gives Python's lock up beside a busy one may wait long for it."""

_POINTER = ctypes.c_void_p


def _declare(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = library[name]
    function.restype, function.argtypes = result, arguments
    return function


_new_tokenizer = _declare(
    _library, "llg_new_tokenizer_v2", _POINTER, ctypes.POINTER(_TokenizerInit), ctypes.c_char_p, ctypes.c_size_t
)
_free_tokenizer = _declare(_library, "llg_free_tokenizer", None, _POINTER)
_new_matcher = _declare(
    _library, "llg_new_matcher", _POINTER, ctypes.POINTER(_MatcherInit), ctypes.c_char_p, ctypes.c_char_p
)
_clone_matcher = _declare(_library, "llg_clone_matcher", _POINTER, _POINTER)
_free_matcher = _declare(_library, "llg_free_matcher", None, _POINTER)
_error = _declare(_short, "llg_matcher_get_error", ctypes.c_char_p, _POINTER)
_compute_mask = _declare(_library, "llg_matcher_compute_mask_into", ctypes.c_int32, _POINTER, _POINTER, ctypes.c_size_t)
_mask_bytes = _declare(_short, "llg_matcher_get_mask_byte_size", ctypes.c_size_t, _POINTER)
_consume = _declare(_short, "llg_matcher_consume_token", ctypes.c_int32, _POINTER, ctypes.c_uint32)
_forced = _declare(
    _short, "llg_matcher_compute_ff_tokens", ctypes.c_int32, _POINTER, ctypes.POINTER(ctypes.c_uint32), ctypes.c_size_t
)
_is_stopped = _declare(_short, "llg_matcher_is_stopped", ctypes.c_bool, _POINTER)

_LIMITS = _Limits(
    max_items_in_row=2_000,
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
)
"""What a schema may cost: tens of milliseconds to compile, a few for the tokens after a token, 40 MB for its states."""

_SLICES = (rb'[^"\\\x00-\x1F\x7F]{1,10}', rb'[^"\\\x00-\x1F\x7F]{1,30}', rb'[^"\\\x00-\x1F\x7F]+')
"""What most tokens are inside a JSON string: these are decided together."""


class GuidanceTokenizer:
    """Owner of a vocabulary as llguidance keeps it.

    Args:
        tokens: The bytes of each token; those that begin with 0xFF stand for no text.
        ends: The tokens that end the generation, at least one.
        tokenize: How the model itself would write a text, in UTF-8, that goes on where another ended; any thread,
            raises nothing. Where a schema leaves no choice of text, these tokens are the only ones allowed, and
            `Matcher.forced` tells them. Without it, every spelling of such a text is allowed, and nothing is forced.
    """

    def __init__(self, tokens: Sequence[bytes], *, ends: Sequence[int], tokenize: Tokenize | None = None) -> None:
        self.n_vocab = len(tokens)
        lengths = np.fromiter(map(len, tokens), np.uint32, len(tokens))
        extra = np.array(ends[1:], np.uint32)
        self._tokenize = _TokenizeFn() if tokenize is None else _callback(tokenize)  # outlives the handle
        init = _TokenizerInit(
            struct_size=ctypes.sizeof(_TokenizerInit),
            vocab_size=len(tokens),
            tok_eos=ends[0],
            token_lens=lengths.ctypes.data,
            token_bytes=b"".join(tokens),
            tokenize_assumes_string=True,
            tokenize_fn=self._tokenize,
            use_approximate_greedy_tokenize_fn=tokenize is None,
            slices=(ctypes.c_char_p * (len(_SLICES) + 1))(*_SLICES, None),
            tok_eos_extra=extra.ctypes.data,
            tok_eos_extra_count=len(extra),
        )
        message = ctypes.create_string_buffer(256)
        self._handle = _new_tokenizer(init, message, len(message))
        if not self._handle:
            raise InvalidSchema(f"this model's vocabulary cannot be held to a schema: {_text(message.value)}")

    def matcher(self, schema: str) -> Matcher:
        """Compile a JSON Schema. Raises `InvalidSchema`."""
        init = _MatcherInit(tokenizer=self._handle, limits=_LIMITS)
        return Matcher(_new_matcher(init, b"json_schema", schema.encode()), self)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            _free_tokenizer(self._handle)


class Matcher:
    """Owner of a schema's state: how far a text has come in it. One thread at a time."""

    def __init__(self, handle: int, tokenizer: GuidanceTokenizer) -> None:
        self._handle = handle
        self._tokenizer = tokenizer  # outlives it
        self.n_vocab = tokenizer.n_vocab
        if error := self.error:
            raise InvalidSchema(error)

    def copy(self) -> Matcher:
        """Another one in the same state."""
        return Matcher(_clone_matcher(self._handle), self._tokenizer)

    @property
    def error(self) -> str:
        """Why it can go no further; empty if it can."""
        return _text(_error(self._handle) or b"")

    @property
    def stopped(self) -> bool:
        """Whether nothing but an end can follow."""
        return bool(_is_stopped(self._handle))

    def mask(self) -> Mask:
        """One bit for each token, the lowest first: whether it may come next. Raises `InvalidSchema`."""
        mask = np.empty(_mask_bytes(self._handle) // 4, np.uint32)
        if _compute_mask(self._handle, mask.ctypes.data, mask.nbytes):
            raise InvalidSchema(self.error)
        return mask

    def forced(self, at_most: int) -> list[int]:
        """The next tokens that can only be these, as far as this is known; the state stays the same."""
        room = (ctypes.c_uint32 * at_most)()
        return room[: max(0, _forced(self._handle, room, at_most))]

    def take(self, token: int) -> None:
        """Go on by a token that the mask allows. Raises `InvalidSchema`."""
        if _consume(self._handle, token):
            raise InvalidSchema(self.error)

    def __del__(self) -> None:
        _free_matcher(self._handle)


def _callback(tokenize: Tokenize) -> Any:
    """A function for C; it is asked again if there was too little room."""

    def call(_data: object, text: int, length: int, room: int, size: int) -> int:
        tokens = tokenize(ctypes.string_at(text, length))
        array = (ctypes.c_uint32 * min(len(tokens), size))(*tokens[:size])
        ctypes.memmove(room, array, ctypes.sizeof(array))
        return len(tokens)

    return _TokenizeFn(call)


def _text(message: bytes) -> str:
    return " ".join(message.decode("utf-8", "replace").replace("<non-verbose/>", "").split())
