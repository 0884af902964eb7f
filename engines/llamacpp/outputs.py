"""What running sequences write: from the logits of a step to their next tokens, and to what is told of them.

Guarantees: a guess is kept only if the sequence's own sampler has chosen that very token, from the row before it and
after all that was chosen before. So nothing that is written depends on guesses, but for the rounding of llama.cpp's
kernels with more rows; and whatever ends a sequence ends it in the middle of them as it would have otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from engines.api import FinishReason, StepEvent
from engines.errors import DecodeFailed, InvalidSchema
from engines.llamacpp.chooser import NOTHING_SAID, Chooser, Floats
from engines.llamacpp.cleansing import cleanse
from engines.llamacpp.grammar import Allowed
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.planner import Output
from engines.llamacpp.slots import Run, Slot
from engines.llamacpp.vocab import Pieces


class Written:
    """What one step writes for one sequence.

    Attributes:
        output: Its rows.
        run: Of that slot.
        tokens: So many were chosen.
        text: Of the answer.
        reasoning: Before it.
        finish: How it ended.
        problem: Why, if it is an error that can be told.
    """

    def __init__(self, output: Output, run: Run) -> None:
        self.output = output
        self.run = run
        self.tokens = 0
        self.text = self.reasoning = ""
        self.finish: FinishReason | None = None
        self.problem = ""

    @property
    def row(self) -> int:
        """Of the logits that the next token is chosen from."""
        return self.output.first + self.tokens

    def goes_on(self, token: int | None) -> bool:
        """Whether, after this token, there are logits for another one."""
        guess, chosen = self.output.guess, self.tokens
        return self.finish is None and chosen <= len(guess) and guess[chosen - 1] == token

    def event(self) -> StepEvent:
        """What is told of it."""
        return event(self.run, text=self.text, reasoning=self.reasoning, finish=self.finish, problem=self.problem)


class Outputs:
    """Continues the sequences of one context.

    Args:
        context: Has the logits of the last step.
        slots: All of its.
        pieces: The text of each token.
        free: Called with the slot of a sequence that has ended.
        copies_late: See `cleanse`.
    """

    def __init__(
        self,
        context: NativeContext,
        slots: Seq[Slot],
        pieces: Pieces,
        *,
        free: Callable[[Slot], None],
        copies_late: bool,
    ) -> None:
        self._context = context
        self._slots = slots
        self._pieces = pieces
        self._chooser = Chooser(pieces.ends)
        self._free = free
        self._copies_late = copies_late

    def take(self, outputs: Seq[Output]) -> list[StepEvent]:
        """The next tokens of these slots, from the rows of the step that was just computed."""
        if not outputs:
            return []
        written = [Written(output, output.slot.run) for output in outputs if output.slot.run is not None]  # all
        logits = self._context.logits(outputs[-1].first + len(outputs[-1].guess) + 1)
        damaged: list[Slot] = []
        left = written
        while left:
            left = self._choose(left, logits, damaged)
        for one in written:
            if one.output.guess and one.output.slot not in damaged:
                self._forget_wrong(one)
        if damaged:
            cleanse(self._context, self._slots, damaged, copies_late=self._copies_late)
        return [one.event() for one in written]

    def _choose(self, written: Seq[Written], logits: Floats, damaged: list[Slot]) -> list[Written]:
        """One token for each of these sequences; returns those that go on with logits that are there already."""
        allowed, problems = _allowed([one.run for one in written])
        rows = [one.row for one in written]
        together = rows[-1] - rows[0] == len(rows) - 1  # then they need not be copied
        part = logits[rows[0] : rows[-1] + 1] if together else logits[rows]
        tokens = self._chooser.choose(part, [one.run.sampler for one in written], allowed)
        going_on = []
        for place, (one, token) in enumerate(zip(written, tokens, strict=True)):
            one.tokens += 1
            if place in problems:
                self._end(one, FinishReason.ERROR, problems[place])
            elif token is None:
                one.output.slot.cached.clear()
                damaged.append(one.output.slot)
                self._end(one, FinishReason.ERROR)
            else:
                self._accept(one, token)
            if one.goes_on(token):
                going_on.append(one)
        return going_on

    def _accept(self, one: Written, token: int) -> None:
        """Take a chosen token in."""
        run, piece = one.run, self._pieces[token]
        if piece is None:
            self._end(one, FinishReason.STOP)
            return
        try:
            complete = run.follower is not None and run.answering and run.follower.take(token)
        except InvalidSchema as error:
            self._end(one, FinishReason.ERROR, str(error))
            return
        run.tokens_out += 1
        run.next_token = token
        if run.guesser is not None:
            run.guesser.took(token)
        one.text += run.text.push(piece.data, shown=piece.shown, marks=piece.special)
        one.reasoning += run.text.reasoning
        if run.text.stopped or complete:
            self._end(one, FinishReason.STOP)
        elif run.tokens_out >= run.sequence.max_tokens:
            self._end(one, FinishReason.LENGTH)

    def _end(self, one: Written, finish: FinishReason, problem: str = "") -> None:
        one.finish, one.problem = finish, problem
        if finish is not FinishReason.ERROR:
            one.text += one.run.text.flush()
            one.reasoning += one.run.text.reasoning
        self._free(one.output.slot)

    def _forget_wrong(self, one: Written) -> None:
        """Cut guesses from the cache that were not chosen."""
        slot, guess = one.output.slot, one.output.guess
        one.run.guess = ()
        wrong = len(guess) + 1 - one.tokens
        if not wrong:
            return
        del slot.cached[-wrong:]
        if not self._context.keep(slot.index, len(slot.cached)):
            raise DecodeFailed("guesses cannot be taken back")


def event(
    run: Run,
    *,
    text: str = "",
    reasoning: str = "",
    tokens_read: int | None = None,
    finish: FinishReason | None = None,
    problem: str = "",
) -> StepEvent:
    """What is told of a run; all of its prompt has been processed unless ``tokens_read`` says otherwise."""
    return StepEvent(
        run.sequence.key,
        text,
        run.text.index,
        run.tokens_out,
        finish,
        tokens_read=len(run.sequence.tokens) if tokens_read is None else tokens_read,
        tokens_cached=run.cached,
        reasoning=reasoning,
        reasoning_index=run.text.reasoning_index,
        problem=problem,
    )


def _allowed(running: Seq[Run]) -> tuple[Mapping[int, Allowed], Mapping[int, str]]:
    """By row, the tokens that a grammar allows next, or why it cannot be followed any further."""
    following = [(row, run.follower) for row, run in enumerate(running) if run.follower is not None and run.answering]
    if not following:
        return NOTHING_SAID, {}
    allowed: dict[int, Allowed] = {}
    problems: dict[int, str] = {}
    for row, follower in following:
        try:
            allowed[row] = follower.allowed()
        except InvalidSchema as error:
            problems[row] = str(error)
    return allowed, problems
