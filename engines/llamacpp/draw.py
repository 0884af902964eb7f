"""A draw from the whole vocabulary, without filters: the token that llama.cpp would draw, without its candidate list.

llama.cpp adds the shares of all tokens by id, takes a random number between 0 and the sum, and adds again until it is
reached. Here blocks of tokens are added first. Both sums round, and the exponentials differ in their last places, so
near the border between two tokens the answer is None.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engines.llamacpp.nucleus import ULP, shares_of

Floats = npt.NDArray[np.float32]

TOGETHER = 8
"""Tokens whose shares are added as floats; their sums are added as doubles."""
BLOCK = 512
"""Such sums in a block."""
DOUBT = 12 * ULP
"""How far a sum may be from llama.cpp's, relative to it: exponentials by 4 units, sums of 8 by 3.5."""


class Uniforms:
    """The random numbers from 0 to 1 that llama.cpp draws with: two words of a Mersenne Twister each."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed)

    def next(self) -> float:
        """The next one."""
        return min(int.from_bytes(self._words.bytes(8), "little") / 2**64, 1 - 2**-53)


def draw(logits: Floats, peak: np.float32, uniform: float, *, temperature: float, scratch: Floats) -> int | None:
    """The token that a random number selects; None if that is not certain.

    Args:
        logits: Of all tokens, shape (n_vocab,).
        peak: The highest of them.
        uniform: The random number.
        temperature: By which they are divided first.
        scratch: Room for as many numbers: to make it each time takes as long as to fill it.
    """
    warm = np.divide(logits, np.float32(temperature), out=scratch)
    shares = shares_of(warm, peak / np.float32(temperature), out=scratch)
    size = TOGETHER * BLOCK
    whole = len(shares) // size * size
    blocks = shares[:whole].reshape(-1, TOGETHER, BLOCK).sum(axis=1).sum(axis=1, dtype=np.float64)
    ends = np.cumsum(np.append(blocks, shares[whole:].sum(dtype=np.float64)))
    aim = uniform * ends[-1]
    low, high = aim * (1 - 2 * DOUBT), aim * (1 + 2 * DOUBT)
    block = int(ends.searchsorted(aim))
    sums = np.cumsum(shares[block * size : (block + 1) * size], dtype=np.float64)
    if block:
        sums += ends[block - 1]
    first, last = sums.searchsorted([low, high])
    certain = first == last < len(sums) and (first > 0 or block == 0 or ends[block - 1] < low)
    return block * size + int(first) if certain else None
