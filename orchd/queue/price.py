"""What tokens cost, in seconds, learnt from running tasks. No lock, no clock.

A later output token costs more than an early one, because it attends to all before it: a line over the position, which
changes slowly. What the other slots hold changes all of a replica's prices at once, and so does another program on the
machine: so each task has its own *level*, which says by how much its last tokens cost more than the line. Say a token
costs 10 ms at position 0 and 20 ms at position 1,000, and a task's last tokens took twice that: then 1,000 more tokens
from position 1,000 take 1,000 × 25 ms × 2 = 50 s. Tasks that have not begun get the level of the last tokens that were
written while no slot was free, because that is the case whenever a task waits.
"""

from __future__ import annotations

_FIRST_PROMPT_TOKEN_S = 0.002  # guesses, before anything was measured
_FIRST_TOKEN_S = 0.02

_LINE_TOKENS = 20_000  # the line forgets what is older than this many tokens
_LEVEL_TOKENS = 64  # a task's level forgets much sooner, because other tasks come and go
_FULL_TOKENS = 128  # the level of all tasks
_OWN_TOKENS = 4  # a task's own level counts as much as all tasks' once it has written this many tokens
_STRETCH = 16  # tokens that are measured together, or the time that this many should take: less says little


class _Sums:
    """Tokens at positions, and what they took; each new one makes all earlier ones count less.

    Args:
        memory: Tokens after which what was added counts less than half.
    """

    def __init__(self, memory: int) -> None:
        self.tokens = self.seconds = 0.0
        self._memory = memory
        self._x = self._xx = self._xy = 0.0

    def add(self, tokens: int, position: float, seconds: float) -> None:
        keep = self._memory / (self._memory + tokens)
        self.tokens = keep * self.tokens + tokens
        self.seconds = keep * self.seconds + seconds
        self._x = keep * self._x + tokens * position
        self._xx = keep * self._xx + tokens * position**2
        self._xy = keep * self._xy + seconds * position

    @property
    def position(self) -> float:
        """The mean."""
        return self._x / self.tokens

    def token_s(self, position: float) -> float:
        """Height there of the straight line through all, by least squares; it does not fall, and is never near 0."""
        mean_s = self.seconds / self.tokens
        spread = self._xx / self.tokens - self.position**2
        slope = (self._xy / self.tokens - self.position * mean_s) / spread if spread > 1 else 0.0
        return max(mean_s + max(0.0, slope) * (position - self.position), mean_s / 4)


class Progress:
    """What a task's last output tokens took.

    Args:
        now: When it got its first one.
        position: Tokens in its context then.
    """

    def __init__(self, now: float, position: int) -> None:
        self.at = now
        """When it was last looked at."""
        self.position = position
        """Tokens in its context then."""
        self.recent = _Sums(_LEVEL_TOKENS)


class TokenPrice:
    """Seconds an output token takes, by its position. A pool's."""

    def __init__(self) -> None:
        self._line = _Sums(_LINE_TOKENS)
        self._full = _Sums(_FULL_TOKENS)

    def note(self, progress: Progress, now: float, position: int, *, full: bool, ended: bool = False) -> None:
        """A task has come so far by now; what it took since the last look is learnt.

        Args:
            progress: What is known of the task; updated.
            now: The time.
            position: Tokens in its context now.
            full: Whether no slot is free.
            ended: Whether this is the last look.
        """
        tokens, seconds = position - progress.position, now - progress.at
        stretch_s = self.level(progress) * self.seconds(progress.position, progress.position + _STRETCH)
        if tokens <= 0 or seconds <= 0 or (tokens < _STRETCH and seconds < stretch_s and not ended):
            return
        for sums in (progress.recent, self._line, *([self._full] if full else [])):
            sums.add(tokens, (progress.position + position) / 2, seconds)
        progress.at, progress.position = now, position

    def level(self, progress: Progress | None = None) -> float:
        """How a task's last tokens, or those of all tasks, compare with the line."""
        full = self._compare(self._full) if self._full.tokens else 1.0
        if progress is None or not progress.recent.tokens:
            return full
        own = progress.recent.tokens
        return (own * self._compare(progress.recent) + _OWN_TOKENS * full) / (own + _OWN_TOKENS)

    def seconds(self, first: int, last: int) -> float:
        """Of the tokens from one position to another, at level 1."""
        token_s = self._line.token_s((first + last) / 2) if self._line.tokens else _FIRST_TOKEN_S
        return (last - first) * token_s

    def _compare(self, recent: _Sums) -> float:
        return recent.seconds / recent.tokens / self._line.token_s(recent.position)


class PromptPrice:
    """Seconds a prompt's token takes: the mean over the last tasks' tokens."""

    def __init__(self) -> None:
        self._sums = _Sums(_LINE_TOKENS)

    def note(self, tokens: int, seconds: float) -> None:
        """A prompt was read."""
        self._sums.add(max(1, tokens), 0, seconds)

    def seconds(self, tokens: int) -> float:
        """Of a prompt."""
        return tokens * (self._sums.token_s(0) if self._sums.tokens else _FIRST_PROMPT_TOKEN_S)
