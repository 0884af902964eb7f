"""What the next step computes, decided from the slots and written into the context's batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engines.api import Beside
from engines.llamacpp.batch import Chunk, Demand, in_turn, plan
from engines.llamacpp.compaction import carry_out, find_move
from engines.llamacpp.copying import Copier
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.saving import Saver
from engines.llamacpp.slots import MIN_COPY, Run, Slot
from engines.llamacpp.speculation import NOTHING, Depth, Speculation
from engines.llamacpp.step_cost import StepCost


class Output(NamedTuple):
    """Rows of one slot that tokens are chosen from.

    Attributes:
        slot: Which.
        row: The first one's place in the batch.
        first: Its place among the rows with logits.
        guess: What the rows after it hold.
    """

    slot: Slot
    row: int
    first: int
    guess: Sequence[int] = ()


@dataclass(frozen=True)
class Step:
    """What the batch holds.

    Attributes:
        n_rows: Its rows.
        decode_rows: Those of streams.
        prefill_tokens: Those of prompts.
        position: Of the first prompt token in its prompt; 0 if there is none.
        outputs: Of the slots that get a token, in the order of the rows.
        copies: Slots that are copied before it computes, as part of its time.
        depth: How far its streams guess.
    """

    n_rows: int
    decode_rows: int
    prefill_tokens: int
    position: int
    outputs: tuple[Output, ...]
    copies: int = 0
    depth: Depth = NOTHING


class Planner:
    """Prepares one context's steps, one after the other.

    Args:
        context: Its batch is written.
        slots: One for each of the context's KV streams.
        cost: What is known of the cost of steps.
        copier: Makes its copies.
        saver: Keeps what a move overwrites.
        moves: Whether sequences may be moved to other slots.
        checkpoints: Whether a prompt's last token is computed by itself, because the state before it is to be saved.
        speculation: Guesses what streams write; None if nothing is to be guessed.
    """

    def __init__(
        self,
        context: NativeContext,
        slots: list[Slot],
        *,
        cost: StepCost,
        copier: Copier,
        saver: Saver,
        moves: bool,
        checkpoints: bool,
        speculation: Speculation | None,
    ) -> None:
        self._context = context
        self._slots = slots
        self._saver = saver
        self._moves = moves
        self._checkpoints = checkpoints
        self._cost = cost
        self._copier = copier
        self._speculation = speculation
        self._streams: list[tuple[Slot, Run]] | None = None  # all that run, if the last step was of these alone
        self._plain: Step | None = None  # that step, if the batch holds it and each of them has one row

    def slots_changed(self) -> None:
        """A sequence came or went: the next step is another one than the last."""
        self._streams = self._plain = None

    def free(self, slot: Slot) -> None:
        """A slot's sequence, if it has one, is over."""
        if slot.run is not None and slot.run.sampler is not None:
            slot.run.sampler.close()
        slot.run = None
        self.slots_changed()

    def prepare(self, beside: Beside) -> Step | None:
        """Copy a cache where a sequence should move, and write the next step into the batch.

        Its tokens count as cached from then on. None if no slot has a run.
        """
        if self._streams is None:
            return self._prepare_any(beside)
        depth = self._guess([run for _, run in self._streams], beside)
        if self._plain is not None and not depth.guesses:
            return self._repeated(self._plain)
        chunks = plan([self._demand(slot, run) for slot, run in self._streams], max_rows=self._context.n_rows)
        step = self._compose(chunks, depth)
        self._plain = None if depth.guesses else step
        return step

    def _prepare_any(self, beside: Beside) -> Step | None:
        """A step of prompts and streams."""
        moved = self._moves and self._move_together()
        running = [(slot, slot.run) for slot in self._slots if slot.run is not None]
        if not running:
            return None
        demands = [self._demand(slot, run) for slot, run in running if run.leader is None]
        decode_rows = sum(run.decoding for _, run in running)
        turn = in_turn(demands)
        position = len(self._slots[turn[0].slot].cached) if turn else 0
        watched = _is_watched(run for _, run in running)
        budget = self._cost.budget(decode_rows, position, beside, watched=watched, spent_s=self._saver.spent_s)
        chunks = plan(demands, budget=budget, max_rows=self._context.n_rows)
        self._note_turns(turn, chunks)
        step = self._compose(chunks, position=position)
        if decode_rows == len(running) and not moved and not step.copies:  # or another may move in the next step
            self._streams, self._plain = running, step
        return step

    def done(self, step: Step, seconds: float) -> None:
        """The step was computed in so many seconds."""
        rows = {"decode_rows": step.decode_rows, "prefill_tokens": step.prefill_tokens, "position": step.position}
        if step.copies:
            expected = self._cost.expected_s(**rows)
            if expected is not None:
                self._copier.queued_took(step.copies, seconds - expected)
            return
        if not step.depth.guesses:
            self._cost.observe(**rows, seconds=seconds)
        if self._speculation is not None and not step.prefill_tokens:
            self._speculation.observe(step.decode_rows, step.depth, seconds)

    def _guess(self, streams: Sequence[Run], beside: Beside) -> Depth:
        if self._speculation is None:
            return NOTHING
        return self._speculation.guess(streams, beside, watched=_is_watched(streams))

    def _demand(self, slot: Slot, run: Run) -> Demand:
        return Demand(
            slot.index,
            len(run.sequence.tokens) - len(slot.cached) if not run.decoding else 0,
            urgent=run.sequence.urgent,
            order=run.order,
            chunk=run.chunk,
            passed=run.passed,
            last_alone=self._checkpoints and len(run.sequence.tokens) > MIN_COPY,
            guesses=len(run.guess),
        )

    def _note_turns(self, turn: Sequence[Demand], chunks: Sequence[Chunk]) -> None:
        """Keep in mind who got rows of the prompts that want some, and who was passed by."""
        rows = {chunk.slot: chunk.rows for chunk in chunks}
        total = sum(rows.get(demand.slot, 0) for demand in turn)
        for demand in turn:
            run, got = self._slots[demand.slot].run, rows.get(demand.slot, 0)
            assert run is not None  # it demands something
            run.chunk, run.passed = (got, 0) if got else (run.chunk, run.passed + total)

    def _compose(self, chunks: Sequence[Chunk], depth: Depth = NOTHING, *, position: int = 0) -> Step:
        """Write the chunks into the batch, and tell what they are."""
        runs = [self._slots[chunk.slot].run for chunk in chunks]
        read = [chunk.rows for chunk, run in zip(chunks, runs, strict=True) if run is not None and not run.decoding]
        n_rows, streams = sum(chunk.rows for chunk in chunks), len(chunks) - len(read)
        outputs = tuple(self._outputs(chunks))
        self._fill(chunks)
        return Step(n_rows, streams, sum(read), position, outputs, self._copier.take_queued(), depth)

    def _outputs(self, chunks: Sequence[Chunk]) -> Iterator[Output]:
        row = first = 0
        for chunk in chunks:
            row += chunk.rows
            if chunk.outputs:
                slot = self._slots[chunk.slot]
                assert slot.run is not None  # the plan is made of running slots
                yield Output(slot, row - chunk.outputs, first, slot.run.guess)
                first += chunk.outputs

    def _repeated(self, step: Step) -> Step:
        """The same streams as in the last step, each one token further."""
        context = self._context
        for slot, row, *_ in step.outputs:
            assert slot.run is not None  # or it was said that something changed
            token = slot.run.next_token
            assert token is not None
            context.token[row], context.pos[row] = token, len(slot.cached)
            slot.cached.append(token)
        return step

    def _move_together(self) -> bool:
        """Let one sequence move next to the others, if that pays; whether one did."""
        move = find_move(self._slots, payback=self._copier.payback)
        if move is None:
            return False
        losing = self._slots[move.target if move.spare is None else move.spare]
        self._saver.save(losing, losing=len(losing.cached))
        if move.spare is not None:
            self._copier.copy(move.target, move.spare, len(self._slots[move.target].cached))
        if self._slots[move.source].cached:
            self._copier.copy(move.source, move.target, len(self._slots[move.source].cached))
            self._context.clear_slot(move.source)
        else:
            self._context.clear_slot(move.target)
        carry_out(move, self._slots)
        return True

    def _fill(self, chunks: Sequence[Chunk]) -> None:
        """Write the chunks into the batch and note them as cached."""
        token: list[int] = []  # numpy takes one long list far faster than many short ones
        pos: list[int] = []
        seq: list[int] = []
        output: list[bool] = []
        for chunk in chunks:
            slot = self._slots[chunk.slot]
            start, end = len(slot.cached), len(slot.cached) + chunk.rows
            run = slot.run
            assert run is not None  # the plan is made of running slots
            tokens = run.sequence.tokens[start:end] if run.next_token is None else (run.next_token, *run.guess)
            slot.cached += tokens
            token += tokens
            pos += range(start, end)
            seq += [slot.index] * chunk.rows
            output += [False] * (chunk.rows - chunk.outputs) + [True] * chunk.outputs
        context, rows = self._context, len(token)
        context.token[:rows], context.pos[:rows], context.seq[:rows], context.output[:rows] = token, pos, seq, output


def _is_watched(runs: Iterable[Run]) -> bool:
    """Whether somebody waits for the next token of one of these."""
    return any(run.decoding and run.sequence.urgent for run in runs)
