"""What chooses the tokens of one sequence: `SamplingParams`, the tokens that it penalises, llama.cpp's samplers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engines.api import SamplingParams
from engines.llamacpp.draw import Uniforms
from engines.llamacpp.native.sampler import NativeSampler

COLDEST = 1e-6
"""Temperatures below are greedy: a logit divided by one may overflow a float, and then any token is chosen."""

REPEAT_WINDOW = 64
"""Tokens that a repeat penalty looks back over (llama.cpp's own default)."""

SEEDS = 0xFFFF_FFFF
"""Seeds there are; to llama.cpp the next one means: draw a seed."""


def is_argmax(params: SamplingParams) -> bool:
    """Whether the next token is the one with the highest logit of all: no `Sampler` is needed for that."""
    return params.temperature < COLDEST and params.repeat_penalty == 1 and not params.ignore_eos


class Sampler:
    """How the next token of one sequence is chosen.

    Args:
        params: As they were asked for.
        prompt: Its tokens.
        follows: Whether a grammar says which tokens are allowed, the ends among them.

    Attributes:
        top_k: Tokens to keep, 0 for all.
        top_p: As a float in C, 1 for off.
        min_p: As a float in C, 0 for off.
        temperature: Of the draw.
        native: llama.cpp's filters and its draw; None where the token with the highest logit is chosen.
        uniforms: The numbers it draws with; None where there is a filter, and they are not needed.
        missed: How many of them have been used that it has not drawn itself.
    """

    def __init__(self, params: SamplingParams, *, prompt: Sequence[int] = (), follows: bool = False) -> None:
        self._params = params
        self._never_ends = params.ignore_eos and not follows
        self.top_k, self.temperature = params.top_k, params.temperature
        self.top_p, self.min_p = float(np.float32(params.top_p)), float(np.float32(params.min_p))
        self.native: NativeSampler | None = None
        self.uniforms: Uniforms | None = None
        self.missed = 0
        if params.temperature >= COLDEST:
            seed = params.seed % SEEDS
            self.native = NativeSampler(
                top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, temperature=self.temperature, seed=seed
            )
            if not self.top_k and self.top_p == 1 and not self.min_p and not follows:
                self.uniforms = Uniforms(seed)
        self._recent: deque[int] | None = None
        if params.repeat_penalty != 1:
            self._recent = deque(prompt[-REPEAT_WINDOW:], REPEAT_WINDOW)

    def adjust(self, logits: npt.NDArray[np.float32], *, ends: Sequence[int]) -> None:
        """Rule out the ends of generation, and divide the logits of the last tokens as llama.cpp does; in place."""
        if self._never_ends:
            for token in ends:  # a handful; an array of them as index takes four times as long
                logits[token] = -np.inf
        if self._recent:
            ids = np.fromiter(set(self._recent), np.intp)
            penalty, old = np.float32(self._params.repeat_penalty), logits[ids]
            logits[ids] = np.where(old <= 0, old * penalty, old / penalty)

    def took(self, token: int) -> None:
        """Take note of the token that was chosen."""
        if self._recent is not None:
            self._recent.append(token)

    def close(self) -> None:
        """Free what is llama.cpp's. Calling it again does nothing."""
        if self.native is not None:
            self.native.close()
