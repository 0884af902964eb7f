"""One model and one context on one device: slots, and the step that moves all of them forward.

Guarantees: a sequence that was admitted gets events until one has ``finish`` set, unless it is cancelled or the model
is reset; no sequence waits for a slower one; text does not depend on which slot or neighbours a sequence has, up to
the rounding of llama.cpp's kernels.
Assumes: one thread at a time calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from engines.api import ALONE, Beside, DeviceSpec, ModelSpec, ProgressCallback, Sequence, StepEvent
from engines.errors import EngineError, LoadFailed
from engines.llamacpp.choices import choices
from engines.llamacpp.chooser import SMALL
from engines.llamacpp.copying import Copier
from engines.llamacpp.grammar import Follower, Grammar
from engines.llamacpp.model_template import reasoning_style
from engines.llamacpp.native import trials
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.native.gpus import index_of
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.native.threads import free_to_move
from engines.llamacpp.outputs import Outputs, event
from engines.llamacpp.planner import Planner
from engines.llamacpp.prefixes import Prefixes
from engines.llamacpp.sampling import Sampler, is_argmax
from engines.llamacpp.slots import Run, Slot
from engines.llamacpp.solo_planner import SoloPlanner
from engines.llamacpp.speculation import Speculation
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
        if spec.deterministic:
            spec = replace(spec, speculate=False, prompt_cache_mib=0)
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
        self._slots = [Slot(index) for index in range(spec.slots)]
        cost = StepCost(spec.step_target_s, self._context.n_rows, lone_s=spec.lone_step_s)
        self._copier = Copier(self._context, cost, clock)
        self._prefixes = Prefixes(
            spec, self._native, self._context, self._slots, copier=self._copier, cost=cost, clock=clock
        )
        self._saver = self._prefixes.saver
        most = self._context.n_guesses
        self._speculation = Speculation(cost, most_rows=most) if most else None
        self._planner = self._make_planner(cost, device)
        self._outputs = Outputs(
            self._context,
            self._slots,
            self._pieces,
            free=self._planner.free,
            forget=self._saver.forget,
            copies_late=self._native.is_recurrent,
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
                trials.try_step(context, token, min(rows, context.n_rows, spec.ctx))
            if chosen.first_rows:
                trials.try_step(context, token, min(context.n_rows // spec.slots, spec.ctx), slots=spec.slots)
                for slots in range(2, spec.slots + 1):
                    trials.try_step(context, token, slots=slots)
            if chosen.tunes_threads and not spec.deterministic:
                trials.choose_threads(context, spec.slots)
        except BaseException as error:
            context.close()
            if not isinstance(error, EngineError):
                raise
            raise LoadFailed(f"{spec.path.name} loads, but its first step fails: {error}") from None
        return context

    def _make_planner(self, cost: StepCost, device: DeviceSpec) -> Planner:
        make = partial(SoloPlanner, chunk=choices(device).solo_chunk) if self._spec.deterministic else Planner
        return make(
            self._context,
            self._slots,
            cost=cost,
            copier=self._copier,
            saver=self._saver,
            moves=self._native.survives_moves,
            checkpoints=self._prefixes.checkpoints,
            speculation=self._speculation,
        )

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
        if self._speculation is not None:
            slot.run.guesser = self._speculation.guesser(prompt)
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
            return self._outputs.take(step.outputs) + self._reading()
        return self._outputs.take(step.outputs)

    def _reading(self) -> list[StepEvent]:
        """How far the prompts are that are not done."""
        running = [(slot, slot.run) for slot in self._slots if slot.run is not None]
        return [event(run, tokens_read=len(slot.cached)) for slot, run in running if not run.decoding]

    def cancel(self, key: str) -> bool:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            if slot.run is not None and slot.run.sequence.key == key:
                self._planner.free(slot)
                self._prefixes.release_followers()
                return True
        return False

    def reset(self) -> None:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            self._planner.free(slot)
            slot.cached = []
        self._saver.clear()
        self._context.clear()

    def close(self) -> None:
        """See `engines.api.LoadedModel`."""
        for slot in self._slots:
            self._planner.free(slot)
        self._context.close()
        self._native.close()
        self._masks.shutdown(wait=False)
