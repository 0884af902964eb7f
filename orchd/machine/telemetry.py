"""What NVML says about the GPUs that are in use, once a second, on a thread of its own.

Guarantees:
- NVML is read at most once a second, however many callers ask and however often, and never on a caller's thread: a
  driver that hangs or is being reset delays no caller;
- a reading is at most `STALE_S` old; a GPU that cannot be read has none, and nothing is raised.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import pynvml

from orchd.machine.devices import gpu_index

_log = logging.getLogger(__name__)

PERIOD_S = 1.0
STALE_S = 5.0
"""A reading older than this is none: NVML hangs."""

_LOST = frozenset(
    {
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    }
)
"""Errors after which CUDA cannot use a GPU either. The others (a timeout, a library newer than the loaded driver) say
nothing about the models that are on it."""


@dataclass(frozen=True)
class Reading:
    """One look at a GPU.

    Attributes:
        free_bytes: Of its memory.
        utilization: Share of the last moments in which it computed, 0 to 1; None if it does not say.
    """

    free_bytes: int
    utilization: float | None


@dataclass(frozen=True)
class _Look:
    """What the last round found out.

    Attributes:
        at: When, on the clock.
        readings: By device.
        lost: Devices that CUDA cannot use any more, and NVML's words for it.
    """

    at: float
    readings: Mapping[str, Reading]
    lost: Mapping[str, str]


class Telemetry:
    """Asks NVML on a thread of its own. Its owner starts and closes it; readings are for any thread.

    Args:
        devices: Names of the devices that are used; only GPUs are looked at.
        clock: Monotonic seconds.
    """

    def __init__(self, devices: Iterable[str], *, clock: Callable[[], float]) -> None:
        self._gpus = {device: index for device in devices if (index := gpu_index(device)) is not None}
        self._clock = clock
        self._look = _Look(float("-inf"), {}, {})
        self._silent: set[str] = set()  # devices whose trouble has been logged
        self._initialised = False
        self._stop = threading.Event()
        self._looked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    # --- any thread ------------------------------------------------------------------------------------------------

    def reading(self, device: str) -> Reading | None:
        """The latest; None for a CPU, for a GPU that cannot be asked, and where NVML hangs."""
        look = self._look
        return look.readings.get(device) if self._clock() - look.at <= STALE_S else None

    def lost(self, device: str) -> str | None:
        """NVML's words for it if CUDA cannot use this GPU any more; it stays lost until NVML says otherwise."""
        return self._look.lost.get(device)

    # --- its owner -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look, if there is a GPU to look at."""
        if self._gpus:
            self._thread.start()
        else:
            self._looked.set()

    def await_look(self, timeout_s: float) -> None:
        """Wait for the first round, but not for a driver that hangs."""
        self._looked.wait(timeout_s)

    def close(self) -> None:
        """End the thread; one that hangs in the driver is left behind."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(PERIOD_S)

    # --- its own thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:
                _log.exception("NVML could not be queried; retrying")
            self._looked.set()
            self._stop.wait(PERIOD_S)
        self._shut_down()

    def look(self) -> None:
        """One round: every GPU is asked once. For its own thread, and for tests that have no thread."""
        readings: dict[str, Reading] = {}
        lost: dict[str, str] = {}
        for device, index in self._gpus.items():
            try:
                readings[device] = self._ask(index)
            except pynvml.NVMLError as error:
                self._note_trouble(device, error)
                if error.value in _LOST:
                    lost[device] = str(error)
                elif device in self._look.lost:
                    lost[device] = self._look.lost[device]  # NVML has not said that it is back
            else:
                self._note_answer(device)
        self._look = _Look(self._clock(), readings, lost)
        if not readings:
            self._shut_down()  # after a reset of the driver only a new start helps

    def _ask(self, index: int) -> Reading:
        if not self._initialised:
            pynvml.nvmlInit()
            self._initialised = True
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        free = int(pynvml.nvmlDeviceGetMemoryInfo(handle).free)
        try:
            utilization = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        except pynvml.NVMLError_NotSupported:
            return Reading(free, None)
        return Reading(free, min(1.0, max(0.0, utilization)))

    def _shut_down(self) -> None:
        if self._initialised:
            self._initialised = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _note_trouble(self, device: str, error: pynvml.NVMLError) -> None:
        if device not in self._silent:
            self._silent.add(device)
            _log.error("%s cannot be queried: NVML reports %s; its metrics are omitted meanwhile", device, error)

    def _note_answer(self, device: str) -> None:
        if device in self._silent:
            self._silent.remove(device)
            _log.warning("%s responds again", device)
