"""How small a prompt's chunk may become where no tile of tokens fits into a step.

On a slow machine, small chunks keep steps short. On one whose processors other programs use, they do not: the threads
of a step wait for each other at each of its hundreds of operations, and it takes half a second however few rows it has.
A prompt of 3,600 tokens that was read in chunks of 16 took 270 s there.

Behind thousands of tokens they do not help either: a chunk below a tile costs twice as much a token.

So now and then a longer chunk is tried. If a token in it is much cheaper, it is the least from then on. For example:
- 16 tokens take 0.50 s, 64 take 0.55 s and 128 take 0.70 s: 128 are the least, and 256, which take 1.1 s, are not;
- 16 take 0.2 s and 64 take 0.35 s: 64 are the least, and 128 are not tried, which should take 0.55 s;
- 16 take 0.3 s and 64 take 1.2 s: 16 remain the least, and the next trial is twice as far away.
"""

from __future__ import annotations

from engines.llamacpp.batch import MIN_CHUNK, TILE, WORTH_A_TILE

_WORTH = 0.65  # of a token's price before, at most: a tile may take 2.6 times as long as a quarter of it
_FIRST, _AGAIN, _LAST = 3, 1, 48  # steps before the first trial, before the next after a good one, and at most
_TRIAL_S = 12.0  # no trial where a longer chunk would take more if each token took as long
_WEIGHT = 0.3  # of the newest step in the mean


class LeastChunk:
    """What is known since prompts do not fit."""

    def __init__(self) -> None:
        self._wait = _FIRST  # steps before a trial
        self.forget()

    def forget(self) -> None:
        """Prompts fit: begin with the smallest again."""
        self._tokens = MIN_CHUNK
        self._mean_s = 0.0
        self._before = 0, 0.0  # the last two for the chunk that was the least before
        self._due = self._wait

    def rest(self) -> None:
        """There is no prompt. That a tile is cheaper than its parts stays true; that a machine is busy may not."""
        if self._tokens > TILE:
            self.forget()

    def size(self, fit: int) -> int:
        """What the next step should have, where so many tokens fit."""
        if fit >= (WORTH_A_TILE if self._tokens <= TILE else self._longer):
            self.forget()
            return fit
        at_least = max(fit, self._tokens)
        on_trial = not self._due and self._mean_s * self._longer / at_least <= _TRIAL_S
        return self._longer if on_trial and self._is_hopeful else at_least

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a step with so many prompt tokens, which took so long besides its streams."""
        if tokens >= self._longer:
            if self._mean_s:
                self._tried(tokens, seconds)
            return
        if tokens < self._tokens:  # the end of a prompt
            return
        seconds *= self._tokens / tokens  # an end may have been read along
        if seconds < self._mean_s / 2:  # the machine is itself again
            self._wait = _FIRST
            self.forget()
        else:
            self._mean_s += (_WEIGHT if self._mean_s else 1.0) * (seconds - self._mean_s)
            self._due = max(0, self._due - 1)

    @property
    def _longer(self) -> int:
        return max(TILE, 2 * self._tokens)

    @property
    def _is_hopeful(self) -> bool:
        """Whether a longer chunk is worth it if the time goes on to grow as it did."""
        tokens, mean_s = self._before
        grows_s = (self._mean_s - mean_s) / (self._tokens - tokens)
        return not tokens or self._is_worth(self._longer, self._mean_s + grows_s * (self._longer - self._tokens))

    def _is_worth(self, tokens: int, seconds: float) -> bool:
        return seconds / tokens < _WORTH * self._mean_s / self._tokens

    def _tried(self, tokens: int, seconds: float) -> None:
        if self._is_worth(tokens, seconds):
            self._before = self._tokens, self._mean_s
            self._tokens, self._mean_s = tokens, seconds
            self._wait, self._due = _FIRST, _AGAIN
        else:
            self._wait = self._due = min(2 * self._wait, _LAST)
