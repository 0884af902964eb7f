"""A brake in llama.cpp's step, so that no test depends on how fast a model is."""

from __future__ import annotations

import functools
import threading
import time

from engines.api import ALONE, Beside, DeviceSpec, Footprint, ModelSpec, ProgressCallback, StepEvent, WaitCallback
from engines.errors import DecodeFailed
from engines.llamacpp.engine import LlamaCppEngine
from engines.llamacpp.model import LlamaModel

DEADLINE_S = 20.0


class Brake:
    """Decides when tasks move forward; any thread. Released to begin with."""

    def __init__(self) -> None:
        self._steps_left: float = float("inf")
        self._error: str | None = None
        self._may_return = threading.Event()
        self._may_return.set()
        self.may_load = threading.Event()
        """Cleared, a load begins and does not end."""
        self.slow_file: str | None = None
        """The only file whose load that holds for; None for every one."""
        self.may_load.set()

    def hold(self) -> None:
        """Steps bring nothing forward, but the worker goes on and obeys."""
        self._steps_left = 0

    def allow(self, steps: int) -> None:
        """So many steps from now on, then hold."""
        self._steps_left = steps

    def block(self) -> None:
        """The next step does not return: the worker hangs."""
        self._may_return.clear()

    def fail(self, why: str) -> None:
        """The next step fails."""
        self._error = why

    def release(self) -> None:
        self._steps_left = float("inf")
        self._may_return.set()
        self.may_load.set()

    def passes(self) -> bool:
        """Whether this step may be a real one; asked by the model's thread."""
        self._may_return.wait(DEADLINE_S)
        if self._error is not None:
            why, self._error = self._error, None
            raise DecodeFailed(why)
        if self._steps_left >= 1:
            self._steps_left -= 1
            return True
        time.sleep(0.001)  # holds, without spinning
        return False


class BrakedEngine(LlamaCppEngine):
    """llama.cpp, with a brake in every model it loads."""

    def __init__(self, brake: Brake) -> None:
        self._brake = brake

    def vet(self, spec: ModelSpec, *, on_wait: WaitCallback | None = None) -> Footprint:
        return _vet(spec)

    def load(self, spec: ModelSpec, device: DeviceSpec, *, on_progress: ProgressCallback | None = None) -> LlamaModel:
        if self._brake.slow_file in (None, spec.path.name):
            self._brake.may_load.wait(DEADLINE_S)
        model = super().load(spec, device, on_progress=on_progress)
        step = model.step

        def braked(beside: Beside = ALONE) -> list[StepEvent]:
            return step(beside) if self._brake.passes() else []

        model.step = braked  # type: ignore[method-assign]  # all that differs
        return model


@functools.cache
def _vet(spec: ModelSpec) -> Footprint:
    """It takes a process each time, and says the same each time."""
    return LlamaCppEngine().vet(spec)
