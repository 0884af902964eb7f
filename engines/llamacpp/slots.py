"""Slots: what each one's KV cache holds, and the sequence that works in it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from engines.api import Sequence
from engines.llamacpp.channels import Phase
from engines.llamacpp.grammar import Follower
from engines.llamacpp.guesser import Guesser
from engines.llamacpp.sampling import Sampler
from engines.llamacpp.text import OutputText

MIN_COPY = 32
"""Tokens a copy must save, however little it costs: so many are computed in a step that is made anyway."""


@dataclass
class Run:
    """A sequence in its slot.

    Attributes:
        sequence: What is being continued.
        order: Admission order, lower is older.
        text: Output as it may be shown.
        sampler: None where the highest logit decides.
        follower: None where any token may come next.
        guesser: None where nothing is guessed.
        guess: Tokens that may follow `next_token`, checked in the same step.
        next_token: Sampled but not yet fed to the model; None while the prompt is being prefilled.
        tokens_out: Output tokens so far.
        leader: A run that is prefilling a prefix of this prompt; until it has, this one waits instead of doing it too.
        shared: Length of that prefix.
        chunk: Rows of the last chunk of its prompt; 0 before the first.
        passed: Rows that other prompts got since.
        cached: Prompt tokens that were found in a cache.
    """

    sequence: Sequence
    order: int
    text: OutputText
    sampler: Sampler | None
    follower: Follower | None = None
    guesser: Guesser | None = None
    guess: Seq[int] = ()
    next_token: int | None = None
    tokens_out: int = 0
    leader: Run | None = None
    shared: int = 0
    chunk: int = 0
    passed: int = 0
    cached: int = 0

    @property
    def answering(self) -> bool:
        """Whether its next token can be part of the answer; a schema says nothing about reasoning."""
        return self.text.phase is not Phase.REASONING

    @property
    def forced(self) -> Seq[int]:
        """The tokens that come next whatever the model makes of it."""
        return self.follower.forced() if self.follower is not None and self.answering else ()

    @property
    def decoding(self) -> bool:
        """Whether its prompt is done."""
        return self.next_token is not None


@dataclass
class Slot:
    """One KV stream of a context.

    Attributes:
        index: llama.cpp's sequence id.
        cached: The tokens whose keys and values the stream holds, by position.
        run: The sequence it works on.
        used: When it was last given away, in admissions; lower is longer ago.
    """

    index: int
    cached: list[int] = field(default_factory=list)
    run: Run | None = None
    used: int = 0
