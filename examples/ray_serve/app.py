"""orchd's engine inside Ray Serve, for more than one machine: one deployment, one replica per GPU.

    pip install "ray[serve]"                # in addition to orchd, of which only `engines/` is used
    serve run examples.ray_serve.app:app model=/models/some.gguf replicas=4

    curl -N http://127.0.0.1:8000/ -d '{"prompt": "Once upon a time", "max_tokens": 64}'

Ray assigns each replica its own GPU (`CUDA_VISIBLE_DEVICES`), anywhere in the cluster, and sends each request to a
replica that has room. The model must be at the same path on every machine. `gpus=0` runs replicas on CPUs.

This has none of what orchd adds to an engine: priorities, a bounded queue with measured back-off, resumable streams,
reloads. Ray has its own solutions for some of these.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from engines.api import DeviceSpec, LoadedModel, ModelSpec, SamplingParams, Sequence, StepEvent
from engines.errors import EngineError
from engines.llamacpp.engine import LlamaCppEngine


class Stepper(threading.Thread):
    """Owns a loaded model: admits sequences while it has free slots, steps it while any run, and posts the events."""

    def __init__(self, model: LoadedModel, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(name="stepper", daemon=True)
        self._model = model
        self._loop = loop
        self._wishes: queue.SimpleQueue[Sequence | str] = queue.SimpleQueue()  # run this, or cancel that key
        self._waiting: dict[str, Sequence] = {}
        self.listeners: dict[str, asyncio.Queue[StepEvent | None]] = {}

    def submit(self, sequence: Sequence) -> asyncio.Queue[StepEvent | None]:
        listener = self.listeners[sequence.key] = asyncio.Queue()
        self._wishes.put(sequence)
        return listener

    def cancel(self, key: str) -> None:
        if self.listeners.pop(key, None) is not None:
            self._wishes.put(key)

    def run(self) -> None:
        while True:
            self._take(block=not self._model.busy and not self._waiting)
            while self._waiting and self._model.free_slots:
                self._model.admit(self._waiting.pop(next(iter(self._waiting))))
            try:
                events = self._model.step() if self._model.busy else []
            except EngineError:  # every running sequence is lost; the model can be used again
                self._model.reset()
                self._loop.call_soon_threadsafe(self._fail)
                continue
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _take(self, *, block: bool) -> None:
        while True:
            try:
                wish = self._wishes.get(block)
            except queue.Empty:
                return
            block = False
            if isinstance(wish, Sequence):
                self._waiting[wish.key] = wish
            elif self._waiting.pop(wish, None) is None:
                self._model.cancel(wish)

    def _deliver(self, events: list[StepEvent]) -> None:
        for event in events:
            if listener := self.listeners.get(event.key):
                listener.put_nowait(event)

    def _fail(self) -> None:
        for listener in self.listeners.values():
            listener.put_nowait(None)


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256)  # more than that gets status 503
class Completions:
    """One model on one device."""

    def __init__(self, model: str, gpus: int, slots: int, ctx: int, threads: int) -> None:
        engine = LlamaCppEngine()
        spec = ModelSpec(Path(model), slots=slots, ctx=ctx)
        device = DeviceSpec("gpu", 0, threads) if gpus else DeviceSpec("cpu", threads=threads)
        engine.vet(spec)  # a damaged file would crash this process
        self._ctx = ctx
        self._vocab = engine.load_vocab(spec.path)
        self._model = engine.load(spec, device)
        self._stepper: Stepper | None = None

    async def __call__(self, request: Request) -> Response:
        if self._stepper is None:
            self._stepper = Stepper(self._model, asyncio.get_running_loop())
            self._stepper.start()
        try:
            sequence = self._sequence(await request.json())
        except (EngineError, KeyError, TypeError, ValueError) as error:
            return JSONResponse({"message": str(error)}, status_code=400)
        return StreamingResponse(self._text(self._stepper, sequence), media_type="text/plain; charset=utf-8")

    def _sequence(self, body: dict[str, object]) -> Sequence:
        tokens = self._vocab.tokenize(str(body["prompt"]))
        max_tokens = int(str(body.get("max_tokens", 256)))
        if not 1 <= max_tokens <= self._ctx - len(tokens):
            raise ValueError(f"max_tokens must be from 1 to {self._ctx - len(tokens)} for this prompt")
        sampling = SamplingParams(temperature=float(str(body.get("temperature", 0.8))))
        return Sequence(str(uuid.uuid4()), tokens, max_tokens, sampling=sampling)

    async def _text(self, stepper: Stepper, sequence: Sequence) -> AsyncIterator[str]:
        listener = stepper.submit(sequence)
        try:
            while True:
                event = await listener.get()
                if event is None:  # the answer cannot be finished: cut the connection, so that the client sees it
                    raise RuntimeError("the engine failed; every running answer is lost")
                yield event.text
                if event.finish is not None:
                    stepper.listeners.pop(sequence.key, None)
                    return
        finally:
            stepper.cancel(sequence.key)  # the client has disconnected


def app(args: dict[str, str]) -> serve.Application:
    """What `serve run` builds; `args` are the `name=value` of its command line."""
    if "model" not in args:
        raise SystemExit("which model? serve run examples.ray_serve.app:app model=/models/some.gguf")
    numbers = {"gpus": 1, "replicas": 1, "threads": 1, "slots": 8, "ctx": 4096}
    for name in numbers.keys() & args.keys():
        if not args[name].isdigit():
            raise SystemExit(f"{name}={args[name]} is not a whole number")
        numbers[name] = int(args[name])
    gpus, threads = numbers["gpus"], numbers["threads"]
    options = {"num_gpus": gpus, "num_cpus": threads if not gpus else 1}
    deployment = Completions.options(num_replicas=numbers["replicas"], ray_actor_options=options)
    return deployment.bind(args["model"], gpus, numbers["slots"], numbers["ctx"], threads)
