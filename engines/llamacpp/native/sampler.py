"""llama.cpp's samplers: from logits to the next token of a sequence."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from engines.llamacpp.native.library import keeping_lock

SHORT = 1 << 15
"""Candidates up to which a call keeps Python's lock; it takes half a millisecond at most."""

_CANDIDATE = np.dtype(llama_cpp.llama_token_data)


_apply_short = keeping_lock("llama_sampler_apply", [ctypes.c_void_p, ctypes.c_void_p])
_apply_long = llama_cpp.llama_sampler_apply
_clone = keeping_lock("llama_sampler_clone", [ctypes.c_void_p], llama_cpp.llama_sampler_p_ctypes)
_free = keeping_lock("llama_sampler_free", [ctypes.c_void_p])


class Candidates:
    """Room for the tokens that a sampler chooses from; it serves any number of samplers, one after another."""

    def __init__(self) -> None:
        self._make_room(1024)

    def _make_room(self, size: int) -> None:
        candidates = np.zeros(size, _CANDIDATE)
        self._ids, self._logits = candidates["id"], candidates["logit"]
        pointer = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self.array = llama_cpp.llama_token_data_array(data=pointer)

    def fill(self, ids: npt.NDArray[np.intp], logits: npt.NDArray[np.float32], *, ranked: bool = False) -> None:
        """Take in these tokens, shape (n,), n at least 1, and their logits; ``ranked`` if the likeliest comes first."""
        size = len(ids)
        if size > len(self._ids):
            self._make_room(2 * size)
        self._ids[:size], self._logits[:size] = ids, logits
        self.array.size, self.array.selected, self.array.sorted = size, -1, ranked

    @property
    def chosen(self) -> int:
        """The id that was drawn."""
        return int(self._ids[self.array.selected])


class NativeSampler:
    """Owner of one sequence's filters, in llama.cpp's usual order, and of the random draw after them."""

    def __init__(self, *, top_k: int, top_p: float, min_p: float, temperature: float, seed: int) -> None:
        self._best = _chain(
            *([llama_cpp.llama_sampler_init_top_k(top_k)] if top_k else []),
            llama_cpp.llama_sampler_init_top_p(top_p, 1),
        )
        self._rest = _chain(
            llama_cpp.llama_sampler_init_min_p(min_p, 1), llama_cpp.llama_sampler_init_temp(temperature)
        )
        self._draw: Any = llama_cpp.llama_sampler_init_dist(seed)

    def choose(self, candidates: Candidates, *, cut: bool = False) -> int:
        """Filter the candidates and draw one; ``cut`` if top-k and top-p need not be applied to them any more."""
        apply = _apply_short if candidates.array.size <= SHORT else _apply_long
        array = ctypes.byref(candidates.array)
        if not cut:
            apply(self._best, array)
        apply(self._rest, array)
        apply(self._draw, array)
        return candidates.chosen

    def skip(self, draws: int) -> None:
        """Leave out so many draws."""
        one = Candidates()
        for _ in range(draws):
            one.fill(np.zeros(1, np.intp), np.zeros(1, np.float32))
            _apply_short(self._draw, ctypes.byref(one.array))

    def saved_draw(self) -> Any:
        """A copy of the state of the draw, for `restore_draw` or `forget_draw`, one of them once."""
        return _clone(self._draw)

    def restore_draw(self, saved: Any) -> None:
        """Draw again as from the moment when this was saved."""
        used, self._draw = self._draw, saved
        _free(used)

    def forget_draw(self, saved: Any) -> None:
        """It was not needed."""
        _free(saved)

    def close(self) -> None:
        """Free the samplers. Calling it again does nothing."""
        for owned in ("_best", "_rest", "_draw"):
            handle = getattr(self, owned)
            setattr(self, owned, None)
            if handle is not None:
                _free(handle)


def _chain(*links: Any) -> Any:
    """A chain of samplers, which owns its links."""
    params = llama_cpp.llama_sampler_chain_default_params()
    params.no_perf = True
    chain = llama_cpp.llama_sampler_chain_init(params)
    for link in links:
        llama_cpp.llama_sampler_chain_add(chain, link)
    return chain
