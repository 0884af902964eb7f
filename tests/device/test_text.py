"""The same text as on the CPU, on either device, alone and beside one another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.api import DeviceSpec
from engines.llamacpp.model import LlamaModel
from tests.engines.support import PROMPTS, exact, run, sequence, tokens_of

pytestmark = [pytest.mark.device, pytest.mark.timeout(300)]

CPU, FIRST, SECOND = DeviceSpec("cpu"), DeviceSpec("gpu", 0), DeviceSpec("gpu", 1)
TOKENS = 24
ROUNDING = 0.02
"""Far more than the logits of these models differ between the devices and the CPU (see the test below)."""


def alone(model: LlamaModel, prompt: tuple[int, ...], max_tokens: int = TOKENS) -> tuple[list[str], list[float]]:
    """The text of each token, and by how much each led the second best."""
    model.reset()
    model.admit(sequence(prompt, max_tokens))
    texts, leads = [], []
    while model.busy:
        for event in model.step():
            texts.append(event.text)
            second, best = np.sort(model._context.logits(1)[0])[-2:]
            leads.append(float(best - second))
    return texts, leads


@pytest.mark.parametrize("name", ["a", "swa"])
@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("device", [FIRST, SECOND], ids=["gpu:0", "gpu:1"])
def test_text_is_the_cpus_but_where_rounding_decides(
    models: Path, name: str, kind: str, device: DeviceSpec, record_property: Callable[[str, object], None]
) -> None:
    path = models / f"{name}.gguf"
    spec = replace(exact(path), cache_type_k=kind, cache_type_v=kind)
    prompts = [tokens_of(path, text) for text in PROMPTS[:6]]
    with contextlib.closing(LlamaModel(spec, CPU)) as model:
        expected = [alone(model, prompt) for prompt in prompts]
    with contextlib.closing(LlamaModel(spec, device)) as model:
        found = [alone(model, prompt)[0] for prompt in prompts]
    places = []
    for number, ((texts, leads), on_device) in enumerate(zip(expected, found, strict=True)):
        if on_device != texts:
            first = next(i for i in range(TOKENS) if on_device[i] != texts[i])
            places.append(f"prompt {number}, token {first}, by {leads[first]:.4f}")
            assert leads[first] < ROUNDING, places[-1]
    record_property("places where rounding decided", places)
    print(f"rounding decided at {len(places)} places: {'; '.join(places)}")
    assert len(places) <= 2


def test_both_devices_and_the_cpu_compute_beside_one_another(models: Path) -> None:
    path = models / "a.gguf"
    prompts = [tokens_of(path, text) for text in PROMPTS[:3]]

    def together(device: DeviceSpec) -> list[str]:
        with contextlib.closing(LlamaModel(exact(path, slots=3), device)) as model:
            outputs = run(model, *(sequence(prompt, TOKENS, key=str(n)) for n, prompt in enumerate(prompts)))
        return [outputs[str(n)].text for n in range(3)]

    with ThreadPoolExecutor(3) as threads:
        texts = list(threads.map(together, (FIRST, SECOND, CPU)))
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) == 3
