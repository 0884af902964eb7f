"""A chain of samplers: from logits to the next token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

REPEAT_WINDOW = 64
"""Tokens that a repeat penalty looks back over (llama.cpp's own default)."""

_CANDIDATE = np.dtype(llama_cpp.llama_token_data)


class NativeSampler:
    """Owner of a sampler chain. Adding a link hands it over to the chain.

    Attributes:
        top_k: How many tokens the chain's first link leaves, which are the most likely ones; 0 if it leaves more.
    """

    def __init__(self, n_vocab: int) -> None:
        params = llama_cpp.llama_sampler_chain_default_params()
        params.no_perf = True
        self._n_vocab = n_vocab
        self.handle: Any = llama_cpp.llama_sampler_chain_init(params)
        self.top_k = 0
        self._make_room(0)

    def _make_room(self, n_candidates: int) -> None:
        candidates = np.zeros(n_candidates, _CANDIDATE)
        self._ids, self._logits = candidates["id"], candidates["logit"]
        pointer = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self._array = llama_cpp.llama_token_data_array(data=pointer)
        self._array_pointer = ctypes.byref(self._array)

    def _add(self, link: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self.handle, link)

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
            self.top_k = 0 if llama_cpp.llama_sampler_chain_n(self.handle) else top_k
            self._add(llama_cpp.llama_sampler_init_top_k(top_k))
        self._add(llama_cpp.llama_sampler_init_top_p(top_p, 1))
        self._add(llama_cpp.llama_sampler_init_min_p(min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(temperature))
        self._add(llama_cpp.llama_sampler_init_dist(seed % llama_cpp.LLAMA_DEFAULT_SEED))  # which means: draw a seed

    def choose(self, ids: npt.NDArray[np.intp], logits: npt.NDArray[np.float32]) -> int:
        """The next token, one of these. A chain that has `top_k` takes no notes.

        Args:
            ids: Tokens, shape (n,), n at least 1.
            logits: Theirs, shape (n,).
        """
        n = len(ids)
        if n > len(self._ids):
            self._make_room(2 * n)
        self._ids[:n], self._logits[:n] = ids, logits
        array = self._array
        array.size, array.selected, array.sorted = n, -1, False
        llama_cpp.llama_sampler_apply(self.handle, self._array_pointer)
        return int(self._ids[array.selected])

    def close(self) -> None:
        """Free the chain. Calling it again does nothing."""
        handle, self.handle = self.handle, None
        if handle is not None:
            llama_cpp.llama_sampler_free(handle)
