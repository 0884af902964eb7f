"""On a real GPU, with a real server process: ``pytest -m gpu``. See `tests.gpu.device` for how to try it on a CPU."""

from __future__ import annotations

import json
import re
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.worker_share import share_outside_decode, spec_of
from engines.api import ModelSpec, SamplingParams, Sequence
from testkit.live import Live, serving
from testkit.synthetic_gguf import main as write_synthetic
from tests.gpu.device import (
    DEVICE,
    GIB,
    ON_GPU,
    Models,
    bytes_of_process,
    check_device,
    ctx_that_fills,
    free_bytes,
    make_models,
    synthetic,
)

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is nothing of it on a CPU")

PROMPT = "the river and the sea "
DRIVER_LAG_S = 3.0
"""Longer than what NVML says may be old in /metrics."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    check_device()
    return make_models(tmp_path_factory.mktemp("models"))


def toml(models: Models, *pools: dict[str, Any]) -> str:
    """A configuration of these pools, on the device under test."""
    lines = [f"[models]\nroots = [{json.dumps(str(models.folder))}]\n[tasks]\ncancel_grace_s = 60\n"]
    for pool in pools:
        table = {"model": str(models.first), "devices": [DEVICE], "slots": 16, "ctx": 1024, **pool}
        lines += ["[[pools]]\n", *(f"{key} = {json.dumps(value)}\n" for key, value in table.items())]
    return "".join(lines)


@pytest.fixture
def live(tmp_path: Path, models: Models) -> Iterator[Live]:
    """One pool with the first model."""
    with serving(tmp_path, toml(models, {})) as server:
        until_ready(server)
        yield server


def until_ready(server: Live) -> None:
    deadline = time.monotonic() + 300
    while server.request("GET", "/health").status != 200:
        assert server.process.popen.poll() is None, server.process.stderr[-2000:]
        assert time.monotonic() < deadline, server.process.stderr[-2000:]
        time.sleep(0.1)


def run(server: Live, **fields: Any) -> dict[str, Any]:
    """A task from start to end: the data of its end, and its text."""
    given = {"prompt": PROMPT, "max_tokens": 64, "ignore_eos": True, **fields}
    events = server.follow(server.submit(**given))
    text = "".join(data["t"] for kind, data in events if kind == "token")
    return {**events[-1][1], "text": text}


def reload(server: Live, model: Path, pool: str = "default") -> tuple[int, dict[str, Any]]:
    body = json.dumps({"new_model_ref": model.stem}).encode()
    answer = server.request("POST", f"/v1/pools/{pool}/reload", body)
    return answer.status, answer.json()


def sample(server: Live, name: str) -> list[float]:
    """Every sample of a metric."""
    return [float(value) for value in re.findall(rf"^{name}\{{.*\}} (\S+)$", server.metrics(), re.MULTILINE)]


# --- load, stream, many at once --------------------------------------------------------------------------------------


def test_it_loads_on_the_device_and_streams(live: Live) -> None:
    [replica] = live.request("GET", "/health").json()["pools"][0]["replicas"]
    assert (replica["device"], replica["alive"]) == (DEVICE, True)
    end = run(live)
    assert (end["tokens_out"], end["finish_reason"]) == (64, "length")


def test_the_same_prompt_gives_the_same_text(live: Live) -> None:
    assert run(live)["text"] == run(live)["text"]


def test_a_deterministic_pool_writes_the_same_beside_others(tmp_path: Path, models: Models) -> None:
    with (
        serving(tmp_path, toml(models, {"deterministic": True, "slots": 4})) as server,
        ThreadPoolExecutor(8) as clients,
    ):
        until_ready(server)

        def text(number: int) -> str:
            prompt = PROMPT * (1 + 20 * (number % 4))
            return str(run(server, prompt=prompt, seed=number % 4, temperature=1.5, max_tokens=32)["text"])

        alone = [text(number) for number in range(4)]
        assert list(clients.map(text, range(16))) == alone * 4
        assert len(set(alone)) == 4


def test_sixteen_tasks_at_once_all_end_as_asked(live: Live) -> None:
    with ThreadPoolExecutor(16) as clients:
        ends = list(clients.map(lambda n: run(live, prompt=f"{PROMPT}{n}", max_tokens=128), range(16)))
    assert [(end["tokens_out"], end["finish_reason"]) for end in ends] == [(128, "length")] * 16


@needs_gpu
def test_every_layer_is_on_the_gpu(tmp_path: Path, models: Models) -> None:
    with serving(tmp_path, toml(models, {}), "--verbose") as server:
        until_ready(server)
        log = server.process.stderr
    offloaded = re.findall(r"offloaded (\d+)/(\d+) layers to GPU", log)
    assert offloaded
    assert all(done == of for done, of in offloaded)


# --- reload ----------------------------------------------------------------------------------------------------------


def test_a_reload_under_load_loses_no_task(live: Live, models: Models) -> None:
    stop = threading.Event()

    def client(number: int) -> list[dict[str, Any]]:
        ends = []
        while not stop.is_set():
            ends.append(run(live, prompt=f"{PROMPT}{number}", max_tokens=48))
        return ends

    with ThreadPoolExecutor(8) as clients:
        running = [clients.submit(client, number) for number in range(8)]
        for model in (models.second, models.first, models.second):
            assert reload(live, model)[0] == 200
        stop.set()
        ends = [end for each in running for end in each.result()]
    assert ends
    assert {(end["tokens_out"], end["finish_reason"]) for end in ends} == {(48, "length")}


@needs_gpu
def test_a_model_whose_context_is_too_large_changes_nothing(tmp_path: Path, models: Models) -> None:
    slots, large = 16, synthetic(models.folder, "8B", "Q4_K")
    ctx, _ = ctx_that_fills(large, slots, int(1.1 * free_bytes()))
    with serving(tmp_path, toml(models, {"slots": slots, "ctx": ctx})) as server:
        until_ready(server)
        status, body = reload(server, large)
        assert (status, body["code"]) == (422, "RELOAD_FAILED")
        assert re.search(r"needs \d+\.\d\d GiB on gpu:\d+ and \d+\.\d\d GiB", body["message"])
        assert f"{models.first.stem} still serves" in body["message"]
        assert run(server)["finish_reason"] == "length"


@needs_gpu
def test_fifty_reloads_leave_the_memory_as_it_was(live: Live, models: Models) -> None:
    used = []
    for number in range(50):
        assert reload(live, (models.second, models.first)[number % 2])[0] == 200
        assert run(live, max_tokens=4)["finish_reason"] == "length"
        time.sleep(0.2)
        used.append(free_bytes())
    early, late = statistics.median(used[5:15]), statistics.median(used[-10:])
    assert early - late < 64 * 2**20, f"{(early - late) / 2**20:.0f} MiB are gone after 50 reloads"


@needs_gpu
def test_a_card_filled_to_its_limit_still_works(tmp_path: Path, models: Models) -> None:
    slots = 8
    ctx, footprint = ctx_that_fills(models.first, slots, int(0.995 * free_bytes()))
    prompt = PROMPT * (min(ctx, 16384) // 10)
    with serving(tmp_path, toml(models, {"slots": slots, "ctx": ctx})) as server:
        until_ready(server)
        assert free_bytes() < 3 * GIB + footprint.total // 20
        with ThreadPoolExecutor(slots) as clients:
            ends = list(clients.map(lambda n: run(server, prompt=f"{n} {prompt}", max_tokens=64), range(slots)))
    assert {end["finish_reason"] for end in ends} == {"length"}


@needs_gpu
def test_what_does_not_fit_is_refused_at_the_start_with_the_numbers(tmp_path: Path, models: Models) -> None:
    ctx, _ = ctx_that_fills(models.first, 8, int(1.2 * free_bytes()))
    wanted = toml(models, {"slots": 8, "ctx": ctx})
    with pytest.raises(AssertionError, match="orchd ended with 2"), serving(tmp_path, wanted):
        pass
    said = " ".join((tmp_path / "stderr").read_text().split())
    assert re.search(rf"needs \d+\.\d\d GiB on {DEVICE}, but only \d+\.\d\d GiB is free; use fewer slots", said)


# --- two workers -----------------------------------------------------------------------------------------------------


def test_one_pool_loads_while_the_other_decodes(tmp_path: Path, models: Models) -> None:
    pools = [{"id": "a", "slots": 4}, {"id": "b", "slots": 4}]
    with serving(tmp_path, toml(models, *pools)) as server:
        until_ready(server)
        gaps: list[float] = []
        with ThreadPoolExecutor(2) as clients:
            ends = [clients.submit(run, server, pool_id="a", max_tokens=512) for _ in range(2)]
            for model in (models.second, models.first):
                began = time.monotonic()
                assert reload(server, model, "b")[0] == 200
                gaps.append(time.monotonic() - began)
            assert {end.result()["finish_reason"] for end in ends} == {"length"}
        assert run(server, pool_id="b")["finish_reason"] == "length"


@needs_gpu
def test_two_models_on_one_gpu_step_and_load_on_two_threads(models: Models) -> None:
    """In this process, as two workers would: what llama.cpp's CUDA backend has to bear."""
    from engines.llamacpp.engine import LlamaCppEngine

    engine = LlamaCppEngine()
    device = spec_of(DEVICE)
    spec = ModelSpec(models.first, slots=4, ctx=512)
    vocab = engine.load_vocab(models.first)
    prompt = vocab.tokenize(PROMPT)
    stop = threading.Event()
    steps = 0

    def decode() -> None:
        nonlocal steps
        model = engine.load(spec, device)
        for number in range(1_000_000):
            if stop.is_set():
                break
            if not model.busy:
                model.admit(Sequence(str(number), prompt, 400, sampling=SamplingParams(temperature=0, ignore_eos=True)))
            steps += len(model.step())
        model.close()

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(decode)
        before = []
        for _ in range(10):
            before.append(steps)
            other = engine.load(spec, device)
            other.admit(Sequence("x", prompt, 8, sampling=SamplingParams(temperature=0, ignore_eos=True)))
            while other.busy:
                other.step()
            other.close()
        stop.set()
        running.result()
    vocab.close()
    assert steps > before[-1] > before[1] > 0  # it went on all the time


# --- metrics ---------------------------------------------------------------------------------------------------------


@needs_gpu
def test_vram_used_bytes_is_what_nvml_shows_for_the_process(tmp_path: Path, models: Models) -> None:
    slots = 8
    ctx, _ = ctx_that_fills(models.first, slots, min(int(0.9 * free_bytes()), 12 * GIB))
    before = free_bytes()
    with serving(tmp_path, toml(models, {"slots": slots, "ctx": ctx})) as server:
        until_ready(server)
        run(server)
        time.sleep(DRIVER_LAG_S)
        held = sum(sample(server, "vram_used_bytes"))
        shown = bytes_of_process(server.process.pid) or before - free_bytes()
    assert held == pytest.approx(shown, rel=0.1)


@needs_gpu
def test_gpu_utilization_goes_up_with_work_and_down_again(live: Live) -> None:
    time.sleep(DRIVER_LAG_S)
    idle = max(sample(live, "gpu_utilization"))
    with ThreadPoolExecutor(16) as clients:
        running = [clients.submit(run, live, prompt=f"{PROMPT}{n}", max_tokens=900) for n in range(32)]
        seen = [idle]
        while not all(task.done() for task in running):
            seen += sample(live, "gpu_utilization")
            time.sleep(0.2)
    assert 0 <= idle <= 1
    assert idle < max(seen) <= 1


def test_a_cpu_has_no_series_and_a_gpu_has_both(live: Live) -> None:
    assert len(sample(live, "gpu_utilization")) == len(sample(live, "vram_used_bytes")) == int(ON_GPU)


# --- speed -----------------------------------------------------------------------------------------------------------


@needs_gpu
def test_the_worker_spends_at_most_a_twentieth_of_a_step_outside_llama_decode(models: Models) -> None:
    share = share_outside_decode(synthetic(models.folder, "8B", "Q4_K"), DEVICE, slots=32, steps=200)
    assert share.outside <= 0.05


def test_the_share_outside_llama_decode_can_be_measured(models: Models) -> None:
    share = share_outside_decode(models.first, DEVICE, slots=4, steps=20)
    assert 0 < share.outside < 1
    assert share.step_s > share.decode_s > 0


def test_the_synthetic_writer_runs_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "written.gguf"
    monkeypatch.setattr("sys.argv", ["synthetic_gguf", str(path), "--shape", "1B", "--type", "Q4_0"])
    write_synthetic()
    assert path.stat().st_size > GIB // 2
