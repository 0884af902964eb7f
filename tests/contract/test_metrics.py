"""Home profile, section 6: metrics and observability."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testkit.harness import serving, until
from tests.contract.forbidden import METRICS, words_in
from tools import metrics_lint

POOL = ["engine", "engine_version", "pool_id"]
REPLICA = [*POOL, "replica_id"]
SERIES = {
    "HOME-6.1": ("queue_depth", [*POOL, "priority"]),
    "HOME-6.2": ("tasks_enqueued_total", [*REPLICA, "priority"]),
    "HOME-6.3": ("tasks_rejected_total", ["engine", "reason"]),
    "HOME-6.4": ("tokens_in_total", REPLICA),
    "HOME-6.5": ("tokens_out_total", REPLICA),
    "HOME-6.9": ("model_state", ["model_id", "state"]),
}
"""As the home profile writes them, in order; those of GPUs are in test_gpu_metrics.py."""


@pytest.fixture(scope="module")
def scrape() -> str:
    """What a real server shows after it ran, refused for each reason that can be had, and was reloaded."""
    return metrics_lint.scrape_after_work()


def samples_of(text: str, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        tuple(sample.labels.items()): sample.value
        for family in metrics_lint.families(text)
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.parametrize(
    ("name", "labels"),
    [pytest.param(name, labels, id=name, marks=pytest.mark.home(clause)) for clause, (name, labels) in SERIES.items()],
)
def test_a_series_is_there_with_exactly_its_labels(scrape: str, name: str, labels: list[str]) -> None:
    found = samples_of(scrape, name)
    assert found
    assert {frozenset(label for label, _ in sample) for sample in found} == {frozenset(labels)}
    assert any(value > 0 for value in found.values()) or name == "queue_depth"


@pytest.mark.home("HOME-6.1")
async def test_queue_depth_counts_what_waits(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}) as server:
        server.brake.hold()
        await server.submit(max_tokens=2)
        await server.started(1)
        for priority in ("batch", "interactive", "batch"):
            await server.submit(priority=priority, max_tokens=2)
        assert await server.total("queue_depth", priority="interactive") == 1
        assert await server.total("queue_depth", priority="batch") == 2
        server.brake.release()

        async def empty() -> bool:
            return await server.total("queue_depth") == 0

        await until(empty, "nothing waits")


@pytest.mark.home("HOME-6.2", "HOME-6.4", "HOME-6.5")
async def test_counters_count_what_happened(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path) as server:
        for tokens in (3, 4):
            await server.run(priority="batch", prompt="the", max_tokens=tokens)
        assert await server.total("tasks_enqueued_total", priority="batch", replica_id="0") == 2
        assert await server.total("tasks_enqueued_total") == 2
        assert await server.total("tokens_out_total") == 7
        assert await server.total("tokens_in_total") == 4  # a BOS and a word, twice


@pytest.mark.home("HOME-6.3")
async def test_rejections_are_counted_by_reason(tiny_model_path: Path) -> None:
    async with serving(tiny_model_path, pool={"slots": 1}, queue={"capacity": 1}) as server:
        assert (await server.post(prompt="")).status == 400
        for _ in range(2):
            assert (await server.post(prompt="the", model_ref="another")).status == 503
        server.brake.hold()
        await server.submit()
        await server.started(1)
        await server.submit()
        for _ in range(3):
            assert (await server.post(prompt="the")).status == 429
        assert await server.total("tasks_rejected_total", reason="INVALID_PARAMS") == 1
        assert await server.total("tasks_rejected_total", reason="POOL_UNAVAILABLE") == 2
        assert await server.total("tasks_rejected_total", reason="ADMISSION_REJECT") == 3
        assert await server.total("tasks_rejected_total") == 6


@pytest.mark.home("HOME-6.8")
def test_there_is_nothing_else(scrape: str) -> None:
    assert metrics_lint.lint(scrape, metrics_lint.load(), gpu=False) == []


@pytest.mark.home("HOME-6.8")
def test_prometheus_has_no_complaint(scrape: str) -> None:
    assert metrics_lint.promtool(scrape) == []


@pytest.mark.home("HOME-6.9")
def test_model_state_is_active_or_retired(scrape: str) -> None:
    states = samples_of(scrape, "model_state")
    assert {dict(labels)["state"] for labels in states} == {"Active", "Retired"}
    models = {dict(labels)["model_id"] for labels in states}
    active = {dict(k)["model_id"] for k, value in states.items() if value == 1 and dict(k)["state"] == "Active"}
    assert (models, active) == ({"tiny-a", "tiny-b"}, {"tiny-b"})
    assert len(states) == 4
    assert sum(states.values()) == 2


@pytest.mark.home("HOME-6.10")
@pytest.mark.parametrize("name", METRICS)
def test_a_series_of_the_full_profile_is_not_there(scrape: str, name: str) -> None:
    assert name not in scrape


@pytest.mark.home("HOME-6.10")
def test_there_is_no_histogram_no_summary_and_no_forbidden_word(scrape: str) -> None:
    assert {family.type for family in metrics_lint.families(scrape)} == {"counter", "gauge"}
    assert words_in(scrape) == set()
    assert "quantile=" not in scrape
    assert "le=" not in scrape


# --- the lint itself -------------------------------------------------------------------------------------------------


def broken(text: str) -> dict[str, tuple[str, str]]:
    """Scrapes with one defect each, and a part of the complaint about it."""
    first = next(line for line in text.splitlines() if line.startswith("queue_depth{"))
    tokens = next(line for line in text.splitlines() if line.startswith("tokens_in_total{"))
    state = next(line for line in text.splitlines() if line.startswith("model_state{"))
    without = "\n".join(line for line in text.splitlines() if "tokens_out_total" not in line) + "\n"
    return {
        "a new series": (f"{text}# HELP p95 x\n# TYPE p95 gauge\np95 1\n", "p95 is not on the list"),
        "a histogram": (
            text + '# HELP h x\n# TYPE h histogram\nh_bucket{le="+Inf"} 1\nh_sum 1\nh_count 1\n',
            "h is not on the list",
        ),
        "_created": (text.replace(tokens, f"{tokens}\n{tokens.replace('_total', '_created')}"), "tokens_in_created"),
        "a series less": (without, "tokens_out_total is missing"),
        "another type": (text.replace("queue_depth gauge", "queue_depth counter"), "queue_depth"),
        "a label more": (text.replace(first, first.replace("{", '{tenant="a",')), "queue_depth has the labels"),
        "a label less": (text.replace(first, first.replace('engine="llamacpp",', "")), "queue_depth has the labels"),
        "a third priority": (text.replace(first, f"{first}\n{first.replace('interactive', 'high')}"), "label priority"),
        "a third state": (text.replace('state="Retired"', 'state="Draft"'), "label state"),
        "a value less": (text.replace(first, ""), "no sample with priority='interactive'"),
        "a negative": (text.replace(first, f"{first.rpartition(' ')[0]} -1.0"), "expected 0"),
        "too many": (
            text.replace(first, "\n".join(first.replace('"default"', f'"p{i}"') for i in range(40))),
            "label pool_id holds",
        ),
        "models that nobody forgot": (
            text.replace(state, "\n".join(state.replace('"tiny-a"', f'"m{i}"') for i in range(47))),
            "model_state has 50 samples, at most 48",
        ),
        "a path": (text.replace('model_id="tiny-a"', 'model_id="/home/me/tiny-a"'), "label model_id"),
        "GPU series without a GPU": (
            f"{text}# HELP gpu_utilization x\n# TYPE gpu_utilization gauge\n"
            + tokens.replace("tokens_in_total", "gpu_utilization").replace("}", ',device="gpu:0"}'),
            "gpu_utilization has samples",
        ),
    }


@pytest.mark.home("HOME-10.3")
@pytest.mark.parametrize("defect", list(broken("queue_depth{a} 1\ntokens_in_total{b} 1\nmodel_state{c} 1\n")))
def test_the_lint_finds_a_defect(scrape: str, defect: str) -> None:
    text, complaint = broken(scrape)[defect]
    assert text != scrape
    assert complaint in " ".join(metrics_lint.lint(f"{text}\n", metrics_lint.load(), gpu=False))


@pytest.mark.home("HOME-10.3")
def test_the_lint_wants_gpu_series_where_there_are_gpus(scrape: str) -> None:
    complaints = metrics_lint.lint(scrape, metrics_lint.load(), gpu=True)
    assert complaints == ["gpu_utilization is missing", "vram_used_bytes is missing"]


@pytest.mark.home("HOME-10.3")
def test_the_list_is_the_home_profiles() -> None:
    rules = {series.name: series.labels for series in metrics_lint.load().series}
    of_gpus = {"gpu_utilization": [*REPLICA, "device"], "vram_used_bytes": [*REPLICA, "device"]}
    assert rules == dict(SERIES.values()) | of_gpus
    assert words_in(json.dumps(list(rules))) == set()
