"""The beginning of a prompt that is known already, and how the prompt's slot comes to hold it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from engines.api import ModelSpec, Sequence
from engines.llamacpp.copying import Copier
from engines.llamacpp.native.context import NativeContext
from engines.llamacpp.native.model import NativeModel
from engines.llamacpp.prefix_index import Known, PrefixIndex
from engines.llamacpp.prompt_cache import Entry, PromptCache
from engines.llamacpp.reuse import Reuse, find_donor, find_leader, find_reuse
from engines.llamacpp.saving import Saver
from engines.llamacpp.slots import MIN_COPY, Run, Slot
from engines.llamacpp.step_cost import StepCost


class Prefixes:
    """Gives prompts their slots, and keeps what a slot holds true to its context's memory.

    Args:
        spec: How much is saved, and how long a step may take.
        model: Says whether a memory can be cut.
        context: Holds the slots' caches.
        slots: All of the context's.
        copier: Makes copies between slots.
        cost: Of steps: what a known token is worth.
        clock: Seconds.

    Attributes:
        saver: Keeps what a slot loses, and restores it.
        checkpoints: Whether the state before a prompt's last token is saved, because one cannot go back to it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model: NativeModel,
        context: NativeContext,
        slots: Seq[Slot],
        *,
        copier: Copier,
        cost: StepCost,
        clock: Callable[[], float],
    ) -> None:
        self._window = model.n_swa
        self._recurrent = model.is_recurrent
        self._reuses = not spec.deterministic
        self._context = context
        self._slots = slots
        self._copier = copier
        cuts = not self._recurrent and not self._window  # a saved window is only the last one
        self._index = PrefixIndex(slots, cuts=cuts)
        cache = PromptCache(spec.prompt_cache_mib << 20, self._index.tree, spare=MIN_COPY)
        self.saver = Saver(context, cache, self._index, slots, cost=cost, limit_s=spec.step_target_s, clock=clock)
        self.checkpoints = spec.prompt_cache_mib > 0 and not cuts

    def assign(self, sequence: Sequence) -> tuple[Slot, tuple[Run, int] | None]:
        """A free slot for a sequence, which holds the first tokens of its prompt where they may be reused.

        Returns:
            The slot, and a run that will prefill more of the prompt, with the length of that prefix.
        """
        if not self._reuses:
            slot = next(slot for slot in self._slots if slot.run is None)
            self._context.clear_slot(slot.index)
            slot.cached = []
            return slot, None
        prompt = list(sequence.tokens)
        known = self._known(prompt)
        reuse = find_reuse(known, self._slots, worth=self._copier.worth)
        slot = self._slots[reuse.slot]
        self._take(prompt, reuse, known.entry)
        if self._recurrent:
            return slot, None
        return slot, find_leader(known, slot, self._slots, urgent=sequence.urgent)

    def _known(self, prompt: list[int]) -> Known:
        """What is of use: the last token is always computed, because its logits are needed."""
        known = self._index.find(prompt[:-1])
        held = [self._can_keep(slot, tokens) for slot, tokens in zip(self._slots, known.held, strict=True)]
        if known.entry is None or not self.saver.pays(known.entry, known.saved):
            return Known(held, known.coming)
        return known._replace(held=held)

    def _take(self, prompt: list[int], reuse: Reuse, entry: Entry | None = None) -> None:
        """Make a slot hold the first tokens of a prompt, from its own cache, another's or a saved one."""
        slot, keep = self._slots[reuse.slot], reuse.keep
        own = reuse.copy_from is None and not reuse.restored
        self.saver.save(slot, losing=len(slot.cached) - (keep if own else 0), then=entry if reuse.restored else None)
        if reuse.copy_from is not None:
            self._copier.copy(reuse.copy_from, reuse.slot, len(self._slots[reuse.copy_from].cached))
        elif reuse.restored and (entry is None or not self.saver.restore(slot, entry)):
            keep = 0
        slot.cached = prompt[: self._cut(reuse.slot, keep)]

    def release_followers(self) -> None:
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
            reuse = find_donor(self._known(prompt), slot, self._slots, worth=self._copier.worth)
            if reuse is not None:
                self._take(prompt, reuse)
                run.cached = len(slot.cached)

    def save_checkpoints(self) -> None:
        """Save what is known before a prompt's last token, if one cannot come back to it later."""
        for slot in self._slots if self.checkpoints else ():
            run = slot.run
            if run is not None and not run.decoding and len(slot.cached) == len(run.sequence.tokens) - 1:
                self.saver.save(slot, losing=len(slot.cached))

    def _can_keep(self, slot: Slot, keep: int) -> int:
        """How many tokens would be left of a slot that is cut back to ``keep``: these, or none."""
        if keep == len(slot.cached):
            return keep
        return keep if not self._recurrent and self._has_window(slot.index, keep) else 0

    def _has_window(self, slot: int, keep: int) -> bool:
        # A recurrent memory is never cut, so nothing of a window is gone; it says that its first position is its last.
        return not self._window or self._recurrent or 0 <= self._context.first_pos(slot) <= max(0, keep - self._window)

    def _cut(self, slot: int, keep: int) -> int:
        """Cut a slot's cache to ``keep`` tokens, or empty it if it cannot go back that far; returns how many are left.

        A sliding-window cache keeps only the last positions, and the next token attends to the whole window before it.
        llama.cpp cuts such a cache and returns True even if part of that window is already gone, and the model would
        then write wrong text without any error. So the first position is read before the cut; afterwards it may be -1.

        For example, with a window of 512 and a slot of 2,000 tokens whose first position is 1,488:
        - a prompt that shares all 2,000 needs the positions from 1,488 on: they are there, 2,000 tokens are kept;
        - a prompt that shares 1,500 needs those from 988 on: 500 of them are gone, so the slot is emptied.
        """
        if keep and self._has_window(slot, keep) and self._context.keep(slot, keep):
            return keep
        self._context.clear_slot(slot)
        return 0
