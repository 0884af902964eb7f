"""A chain of samplers: from logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp

REPEAT_WINDOW = 64
"""Tokens that a repeat penalty looks back over (llama.cpp's own default)."""


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
