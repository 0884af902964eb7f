"""One model and one context on one device: slots, and the step that moves all of them forward.

Guarantees: a sequence that was admitted gets events until one has ``finish`` set, unless it is cancelled or the model
is reset; no sequence waits for a slower one; text does not depend on which slot or neighbours a sequence has, up to
the rounding of llama.cpp's kernels.
Assumes: one thread at a time calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor

from engines.api import ALONE, Beside, DeviceSpec, FinishReason, ModelSpec, ProgressCallback, Sequence, StepEvent
from engines.errors import EngineError, InvalidSchema, LoadFailed
from engines.llamacpp.choices import choices
from engines.llamacpp.chooser import NOTHING_SAID, SMALL, Chooser
from engines.llamacpp.cleansing import cleanse
from engines.llamacpp.copying import Copier
from engines.llamacpp.grammar import Allowed, Follower, Grammar
from engines.llamacpp.model_template import reasoning_style
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.native.gpus import index_of
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.native.threads import free_to_move
from engines.llamacpp.planner import Planner
from engines.llamacpp.prefixes import Prefixes
from engines.llamacpp.sampling import Sampler, is_argmax
from engines.llamacpp.slots import Run, Slot
from engines.llamacpp.step_cost import StepCost
from engines.llamacpp.text import OutputText
from engines.llamacpp.vocab import Pieces


class LlamaModel:
    """See `engines.api.LoadedModel`.

    Raises:
        LoadFailed: The file, the parameters or the first decode failed; nothing is left open.
        OutOfDeviceMemory: It does not fit on the device.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: DeviceSpec,
        *,
        on_progress: ProgressCallback | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spec = spec
        self._clock = clock
        self._native = NativeModel(spec.path, gpu=index_of(device), mmap=spec.mmap, on_progress=on_progress)
        try:
            if not self._native.generates:
                raise LoadFailed(f"{spec.path.name} does not generate text (an embedding or encoder model)")
            with free_to_move():
                self._context = self._open_context(device)
        except BaseException:
            self._native.close()
            raise
        self._style = reasoning_style(self._native)
        self._pieces = Pieces(self._native, self._style)
        self._chooser = Chooser(self._pieces.ends)
        self._slots = [Slot(index) for index in range(spec.slots)]
        cost = StepCost(spec.step_target_s, self._context.n_rows, lone_s=spec.lone_step_s)
        self._copier = Copier(self._context, cost, clock)
        self._prefixes = Prefixes(
            spec, self._native, self._context, self._slots, copier=self._copier, cost=cost, clock=clock
        )
        self._saver = self._prefixes.saver
        self._planner = Planner(
            self._context,
            self._slots,
            cost=cost,
            copier=self._copier,
            saver=self._saver,
            moves=self._native.survives_moves,
            checkpoints=self._prefixes.checkpoints,
        )
        self._admissions = 0
        self._masks = ThreadPoolExecutor(1, "masks")  # its thread starts with the first schema

    def _open_context(self, device: DeviceSpec) -> NativeContext:
        """A context that has shown that it works."""
        spec = self._spec
        chosen = choices(device)
        context = NativeContext(
            self._native, spec, threads=device.threads, cpus=device.cpus, copies_held=chosen.copies_held
        )
        try:
            token = max(self._native.bos, 0)
            for rows in (context.n_rows, *chosen.first_rows) if chosen.first_rows else (1,):
                context.try_step(token, min(rows, context.n_rows, spec.ctx))
            if chosen.first_rows:
                context.try_step(token, min(context.n_rows // spec.slots, spec.ctx), slots=spec.slots)
                for slots in range(2, spec.slots + 1):
                    context.try_step(token, slots=slots)
            if chosen.tunes_threads:
                context.choose_threads(spec.slots)
        except BaseException as error:
            context.close()
            if not isinstance(error, EngineError):
                raise
            raise LoadFailed(f"{spec.path.name} loads, but its first step fails: {error}") from None
        return context

    @property
    def free_slots(self) -> int:
        """See `engines.api.LoadedModel`."""
        return sum(slot.run is None for slot in self._slots)

    @property
    def busy(self) -> bool:
        """See `engines.api.LoadedModel`."""
        return any(slot.run is not None for slot in self._slots)

    @property
    def device_bytes(self) -> int:
        """See `engines.api.LoadedModel`; 0 on a CPU."""
        return self._native.buffers.on_device + self._context.buffers.on_device

    @property
    def saved_bytes(self) -> int:
        """See `engines.api.LoadedModel`."""
        return self._saver.n_bytes

    def admit(self, sequence: Sequence) -> None:
        """See `engines.api.LoadedModel`."""
        slot, leader = self._prefixes.assign(sequence)
        follower = self._follower(sequence)
        follows = follower is not None
        prompt = list(sequence.tokens)
        sampler = None if is_argmax(sequence.sampling) else Sampler(sequence.sampling, prompt=prompt, follows=follows)
        self._admissions += 1
        slot.used = self._admissions
        text = OutputText(sequence.stop, self._style, sequence.reply)
        slot.run = Run(sequence, self._admissions, text, sampler, follower, cached=len(slot.cached))
        if leader is not None:
            slot.run.leader, slot.run.shared = leader
        self._planner.slots_changed()

    def _follower(self, sequence: Sequence) -> Follower | None:
        if sequence.grammar is None:
            return None
        assert isinstance(sequence.grammar, Grammar)  # of this engine's `Vocab`
        ignore_eos = sequence.sampling.ignore_eos
        return Follower(sequence.grammar, self._masks, ends=self._pieces.ends, most=SMALL, to_the_end=ignore_eos)

    @property
    def heartbeat(self) -> int:
        """See `engines.api.LoadedModel`; a GPU does not tell."""
        return self._context.heartbeat.count

    def step(self, beside: Beside = ALONE) -> list[StepEvent]:
        """See `engines.api.LoadedModel`."""
        step = self._planner.prepare(beside)
        if step is None:
            return []
        started = self._clock()
        self._context.decode(step.n_rows)
        self._planner.done(step, self._clock() - started)
        self._saver.next_step()
        if step.prefill_tokens:
            self._prefixes.save_checkpoints()
            self._prefixes.release_followers()  # before a leader that ends leaves its slot to somebody else
            return self._sample(step.outputs) + self._reading()
        return self._sample(step.outputs)

    def _reading(self) -> list[StepEvent]:
        """How far the prompts are that are not done."""
        running = [(slot, slot.run) for slot in self._slots if slot.run is not None]
        return [_event(run, tokens_read=len(slot.cached)) for slot, run in running if not run.decoding]

    def _sample(self, outputs: Seq[tuple[Slot, int]]) -> list[StepEvent]:
        """The next token of each of these slots, from the logits of a row."""
        if not outputs:
            return []
        running = [(slot, slot.run) for slot, _ in outputs if slot.run is not None]  # all of them: they were planned
        allowed, problems = _allowed([run for _, run in running])
        samplers = [run.sampler for _, run in running]
        tokens = self._chooser.choose(self._context.logits(len(outputs)), samplers, allowed)
        events = [
            self._stop_following(slot, run, problems[row])
            if row in problems
            else self._fail(slot, run)
            if token is None
            else self._accept(slot, run, token)
            for row, ((slot, run), token) in enumerate(zip(running, tokens, strict=True))
        ]
        if None in tokens:
            damaged = [slot for (slot, _), token in zip(running, tokens, strict=True) if token is None]
            cleanse(self._context, self._slots, damaged, copies_late=self._native.is_recurrent)
        return events

    def _fail(self, slot: Slot, run: Run) -> StepEvent:
        """End a sequence for which the model has computed NaN or infinity instead of logits."""
        self._saver.forget(slot.cached)
        slot.cached = []
        self._free(slot)
        return _event(run, finish=FinishReason.ERROR)

    def _stop_following(self, slot: Slot, run: Run, problem: str) -> StepEvent:
        """End a sequence whose grammar cannot be followed any further."""
        self._free(slot)
        return _event(run, finish=FinishReason.ERROR, problem=problem)

    def _accept(self, slot: Slot, run: Run, token: int) -> StepEvent:
        """Take a sampled token in; frees the slot if it was the last."""
        piece = self._pieces[token]
        output, finish = run.text, None
        text = reasoning = ""
        if piece is None:
            finish = FinishReason.STOP
        else:
            try:
                complete = run.follower is not None and run.answering and run.follower.take(token)
            except InvalidSchema as error:
                return self._stop_following(slot, run, str(error))
            run.tokens_out += 1
            run.next_token = token
            text = output.push(piece.data, shown=piece.shown, marks=piece.special)
            reasoning = output.reasoning
            if output.stopped or complete:
                finish = FinishReason.STOP
            elif run.tokens_out >= run.sequence.max_tokens:
                finish = FinishReason.LENGTH
        if finish is not None:
            text += output.flush()
            reasoning += output.reasoning
            self._free(slot)
        return _event(run, text=text, reasoning=reasoning, finish=finish)

    def cancel(self, key: str) -> bool:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            if slot.run is not None and slot.run.sequence.key == key:
                self._free(slot)
                self._prefixes.release_followers()
                return True
        return False

    def reset(self) -> None:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            self._free(slot)
            slot.cached = []
        self._saver.clear()
        self._context.clear()

    def close(self) -> None:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            self._free(slot)
        self._context.close()
        self._native.close()
        self._masks.shutdown(wait=False)

    def _free(self, slot: Slot) -> None:
        if slot.run is not None and slot.run.sampler is not None:
            slot.run.sampler.close()
        slot.run = None
        self._planner.slots_changed()


def _event(
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
