"""One model and one context on one device: slots, and the step that moves all of them forward.

Guarantees: a sequence that was admitted gets events until one has ``finish`` set, unless it is cancelled or the model
is reset; no sequence waits for a slower one; text does not depend on which slot or neighbours a sequence has, up to
the rounding of llama.cpp's kernels.
Assumes: one thread at a time calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engines.api import ALONE, Beside, DeviceSpec, FinishReason, ModelSpec, ProgressCallback, Sequence, StepEvent
from engines.errors import EngineError, LoadFailed
from engines.llamacpp.choices import choices
from engines.llamacpp.chooser import Chooser
from engines.llamacpp.cleansing import cleanse
from engines.llamacpp.copying import Copier
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.native.gpus import index_of
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.native.threads import free_to_move
from engines.llamacpp.planner import Planner
from engines.llamacpp.sampling import Sampler, is_argmax
from engines.llamacpp.slots import Reuse, Run, Slot, find_donor, find_leader, find_reuse
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
        self._pieces = Pieces(self._native)
        self._chooser = Chooser(self._pieces.ends)
        self._slots = [Slot(index) for index in range(spec.slots)]
        cost = StepCost(spec.step_target_s, self._context.n_rows, lone_s=spec.lone_step_s)
        self._copier = Copier(self._context, cost, clock)
        self._planner = Planner(
            self._context, self._slots, cost=cost, copier=self._copier, apart=self._native.is_recurrent
        )
        self._admissions = 0

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
                context.try_slots(token, spec.slots)
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

    def admit(self, sequence: Sequence) -> None:
        """See `engines.api.LoadedModel`."""
        prompt = list(sequence.tokens)
        may_copy = not self._native.is_recurrent
        reuse = find_reuse(prompt, self._slots, worth=self._copier.worth if may_copy else None)
        slot = self._slots[reuse.slot]
        self._take_prefix(prompt, reuse)
        leader = find_leader(prompt, len(slot.cached), self._slots, urgent=sequence.urgent) if may_copy else None
        sampler = None if is_argmax(sequence.sampling) else Sampler(sequence.sampling, prompt=prompt)
        self._admissions += 1
        slot.used = self._admissions
        slot.run = Run(sequence, self._admissions, OutputText(sequence.stop), sampler)
        if leader is not None:
            slot.run.leader, slot.run.shared = leader
        self._planner.slots_changed()

    def _take_prefix(self, prompt: list[int], reuse: Reuse) -> None:
        """Make a slot hold the first tokens of a prompt, from its own cache or another's."""
        if reuse.copy_from is not None:
            self._copier.copy(reuse.copy_from, reuse.slot, len(self._slots[reuse.copy_from].cached))
        self._slots[reuse.slot].cached = prompt[: self._kept(reuse.slot, reuse.keep)]

    def _release_followers(self) -> None:
        """Let runs go on whose leader has prefilled what they share, or will not any more."""
        if not any(slot.run is not None and slot.run.leader is not None for slot in self._slots):
            return
        leading = {id(slot.run): len(slot.cached) for slot in self._slots if slot.run is not None}
        for slot in self._slots:
            run = slot.run
            if run is None or run.leader is None or leading.get(id(run.leader), run.shared) < run.shared:
                continue
            run.leader = None
            prompt = list(run.sequence.tokens)
            reuse = find_donor(prompt, slot, self._slots, worth=self._copier.worth)
            if reuse is not None:
                self._take_prefix(prompt, reuse)

    def _kept(self, slot: int, keep: int) -> int:
        """Cut a slot's cache to ``keep`` tokens, or empty it if it cannot go back that far; returns how many are left.

        A sliding-window cache keeps only the last positions, and the next token attends to the whole window before it.
        llama.cpp cuts such a cache and returns True even if part of that window is already gone, and the model would
        then write wrong text without any error. So the first position is read before the cut; afterwards it may be -1.

        For example, with a window of 512 and a slot of 2,000 tokens whose first position is 1,488:
        - a prompt that shares all 2,000 needs the positions from 1,488 on: they are there, 2,000 tokens are kept;
        - a prompt that shares 1,500 needs those from 988 on: 500 of them are gone, so the slot is emptied.
        """
        context, window = self._context, self._native.n_swa
        whole = not window or 0 <= context.first_pos(slot) <= max(0, keep - window)
        if keep and whole and context.keep(slot, keep):
            return keep
        context.clear_slot(slot)
        return 0

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
        if step.prefill_tokens:
            self._release_followers()  # before a leader that ends leaves its slot to somebody else
        return self._sample(step.outputs)

    def _sample(self, outputs: Seq[tuple[Slot, int]]) -> list[StepEvent]:
        """The next token of each of these slots, from the logits of a row."""
        if not outputs:
            return []
        running = [(slot, slot.run) for slot, _ in outputs if slot.run is not None]  # all of them: they were planned
        tokens = self._chooser.choose(self._context.logits(len(outputs)), [run.sampler for _, run in running])
        events = [
            self._fail(slot, run) if token is None else self._accept(slot, run, token)
            for (slot, run), token in zip(running, tokens, strict=True)
        ]
        if None in tokens:
            damaged = [slot for (slot, _), token in zip(running, tokens, strict=True) if token is None]
            cleanse(self._context, self._slots, damaged, copies_late=self._native.is_recurrent)
        return events

    def _fail(self, slot: Slot, run: Run) -> StepEvent:
        """End a sequence for which the model has computed NaN or infinity instead of logits."""
        slot.cached.clear()
        self._free(slot)
        return StepEvent(run.sequence.key, "", run.text.index, run.tokens_out, FinishReason.ERROR)

    def _accept(self, slot: Slot, run: Run, token: int) -> StepEvent:
        """Take a sampled token in; frees the slot if it was the last."""
        piece = self._pieces[token]
        finish = None
        if piece is None:
            text, finish = run.text.flush(), FinishReason.STOP
        else:
            run.tokens_out += 1
            run.next_token = token
            text = run.text.push(piece)
            if run.text.stopped:
                finish = FinishReason.STOP
            elif run.tokens_out >= run.sequence.max_tokens:
                text, finish = text + run.text.flush(), FinishReason.LENGTH
        if finish is not None:
            self._free(slot)
        return StepEvent(run.sequence.key, text, run.text.index, run.tokens_out, finish)

    def cancel(self, key: str) -> bool:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            if slot.run is not None and slot.run.sequence.key == key:
                self._free(slot)
                self._release_followers()
                return True
        return False

    def reset(self) -> None:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            self._free(slot)
            slot.cached.clear()
        self._context.clear()

    def close(self) -> None:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            self._free(slot)
        self._context.close()
        self._native.close()

    def _free(self, slot: Slot) -> None:
        if slot.run is not None and slot.run.sampler is not None:
            slot.run.sampler.close()
        slot.run = None
        self._planner.slots_changed()
