"""`SamplingParams` to a sampler chain."""

from __future__ import annotations

from collections.abc import Sequence

from engines.api import SamplingParams
from engines.llamacpp.native.sampler import NativeSampler

COLDEST = 1e-6
"""Temperatures below are greedy: a logit divided by one may overflow a float, and then any token is chosen."""


def is_argmax(params: SamplingParams) -> bool:
    """Whether the next token is the one with the highest logit among the allowed: no chain is needed for that."""
    return params.temperature < COLDEST and params.repeat_penalty == 1


def build(params: SamplingParams, *, n_vocab: int, prompt: Sequence[int]) -> NativeSampler:
    """The chain for one sequence; the caller closes it.

    Args:
        params: What was asked for.
        n_vocab: Size of the model's vocabulary.
        prompt: Its tokens count for the repeat penalty.
    """
    chain = NativeSampler(n_vocab)
    if params.repeat_penalty != 1:
        chain.penalize_repeats(params.repeat_penalty, prompt)
    if params.temperature < COLDEST:
        chain.greedy()
    else:
        chain.random(
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            temperature=params.temperature,
            seed=params.seed,
        )
    return chain
