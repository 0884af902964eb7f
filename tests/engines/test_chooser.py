"""A token is the one that llama.cpp's own chain of samplers draws from the whole row, however it was found."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engines.api import SamplingParams
from engines.llamacpp import chooser as chooser_module
from engines.llamacpp.chooser import Chooser
from engines.llamacpp.sampling import REPEAT_WINDOW, Sampler, is_argmax

Floats = npt.NDArray[np.float32]

N_VOCAB = 20_011
"""Above `chooser.SMALL`, and no multiple of anything."""


class Reference:
    """The chain as llama.cpp's own programs build and call it: every link looks at every candidate."""

    def __init__(self, params: SamplingParams, n_vocab: int, prompt: Sequence[int]) -> None:
        self._chain: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        links = []
        if params.repeat_penalty != 1:
            links.append(llama_cpp.llama_sampler_init_penalties(n_vocab, 64, params.repeat_penalty, 0.0, 0.0))
            for token in prompt[-64:]:
                llama_cpp.llama_sampler_accept(links[0], token)
        if params.temperature == 0:
            links.append(llama_cpp.llama_sampler_init_greedy())
        else:
            if params.top_k:
                links.append(llama_cpp.llama_sampler_init_top_k(params.top_k))
            links += [
                llama_cpp.llama_sampler_init_top_p(params.top_p, 1),
                llama_cpp.llama_sampler_init_min_p(params.min_p, 1),
                llama_cpp.llama_sampler_init_temp(params.temperature),
                llama_cpp.llama_sampler_init_dist(params.seed),
            ]
        for link in links:
            llama_cpp.llama_sampler_chain_add(self._chain, link)

    def token(self, logits: Floats) -> int:
        candidates = np.zeros(len(logits), np.dtype(llama_cpp.llama_token_data))
        candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
        data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array = llama_cpp.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(candidates["id"][array.selected])
        llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)
