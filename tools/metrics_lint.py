"""``metrics.lint.json`` against what a server really shows: nothing more, less or different.

``python -m tools.metrics_lint`` (``make metrics-lint``) starts a server on tiny models, has it work, refuse and reload,
and lints what it shows then; with ``--url URL`` it lints a server that runs (token in ``ORCHD_TOKEN``; ``--gpu`` if it
has GPU replicas).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import msgspec
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from testkit.live import Live, serving

FILE = Path(__file__).parents[1] / "metrics.lint.json"


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the parts of ``metrics.lint.json``."""


class Series(_Rule, frozen=True, kw_only=True):
    """One series; see the file's own ``about``."""

    name: str
    type: Literal["gauge", "counter"]
    labels: list[str]
    every_value: list[str] = []
    only_on: Literal["gpu"] | None = None
    at_least: float = float("-inf")
    at_most: float = float("inf")
    samples_at_most: int | None = None


class Label(_Rule, frozen=True, kw_only=True):
    """What a label may hold: some values, or text that fits a pattern."""

    values: list[str] | None = None
    pattern: str | None = None
    at_most: int | None = None

    def complaint(self, seen: set[str]) -> str:
        """What is wrong with the values that were seen; empty if nothing."""
        if self.values is not None:
            strange = sorted(seen - set(self.values))
        else:
            strange = sorted(value for value in seen if not re.fullmatch(self.pattern or "", value))
        if strange:
            return f"must not hold {', '.join(map(repr, strange))}"
        if self.at_most is not None and len(seen) > self.at_most:
            return f"holds {len(seen)} different values, at most {self.at_most} are allowed"
        return ""


class Rules(_Rule, frozen=True, kw_only=True):
    """The whole file."""

    about: list[str]
    series: list[Series]
    labels: dict[str, Label]


def load(path: Path = FILE) -> Rules:
    """Raises `msgspec.ValidationError` if the file is not as described."""
    return msgspec.json.decode(path.read_bytes(), type=Rules)


def families(text: str) -> list[Metric]:
    """Each family of a scrape; what lies between two TYPE lines of the same name is two families."""
    return list(text_string_to_metric_families(text))


def lint(text: str, rules: Rules, *, gpu: bool) -> list[str]:
    """What is wrong with a scrape, a sentence each.

    Args:
        text: The text exposition format.
        rules: What is allowed.
        gpu: Whether the server has GPU replicas; then series that are only on GPUs must have samples, else must not.
    """
    wanted = {series.name: series for series in rules.series}
    kinds: dict[str, str] = {}
    samples: dict[str, list[Sample]] = {}
    complaints = []
    for family in families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        if name in kinds:
            complaints.append(f"{name} is there twice")
        kinds[name] = family.type
        samples[name] = [sample for sample in family.samples if sample.name == name]
        more = sorted({sample.name for sample in family.samples} - {name})
        complaints += [f"{extra} is not on the list" for extra in more]
        if name in wanted and not family.documentation:
            complaints.append(f"{name} has no HELP line")
    complaints += [f"{name} is not on the list" for name in kinds if name not in wanted]
    for series in rules.series:
        complaints += _complaints(series, kinds.get(series.name), samples.get(series.name, []), rules, gpu=gpu)
    seen: dict[str, set[str]] = defaultdict(set)
    for name in samples.keys() & wanted:
        for sample in samples[name]:
            for label, value in sample.labels.items():
                seen[label].add(value)
    for label, rule in rules.labels.items():
        if complaint := rule.complaint(seen[label]):
            complaints.append(f"label {label} {complaint}")
    return complaints


def _complaints(series: Series, kind: str | None, samples: list[Sample], rules: Rules, *, gpu: bool) -> list[str]:
    if series.only_on == "gpu" and not gpu:
        return [f"{series.name} has samples on a server without GPUs"] if samples else []
    if kind is None or not samples:
        return [f"{series.name} is missing"]
    found = [f"{series.name} is a {kind}, expected a {series.type}"] if kind != series.type else []
    for sample in samples:
        if set(sample.labels) != set(series.labels):
            found.append(f"{series.name} has the labels {list(sample.labels)}, expected {series.labels}")
        if not series.at_least <= sample.value <= series.at_most:
            found.append(f"{series.name} is {sample.value}, expected {series.at_least} to {series.at_most}")
    if series.samples_at_most is not None and len(samples) > series.samples_at_most:
        found.append(f"{series.name} has {len(samples)} samples, at most {series.samples_at_most} are allowed")
    for label in series.every_value:
        missing = set(rules.labels[label].values or ()) - {sample.labels.get(label) for sample in samples}
        found += [f"{series.name} has no sample with {label}={value!r}" for value in sorted(missing)]
    return found


def promtool(text: str) -> list[str]:
    """What Prometheus's own linter says; nothing where it is not installed."""
    program = shutil.which("promtool")
    if program is None:
        return []
    done = subprocess.run([program, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return [f"promtool: {line}" for line in lines] if done.returncode else []


def work(live: Live, *, other_model: str) -> None:
    """Have a server do everything that is counted: run, refuse for each reason, reload. It should have one slot."""
    for priority in ("interactive", "batch"):
        live.follow(live.submit(priority=priority, max_tokens=8))
    assert live.post(max_tokens=0).status == 400
    assert live.post(model_ref="no-such-model").status == 503
    waiting, refusal = live.until_full(priority="batch", max_tokens=400, ignore_eos=True)
    assert refusal.status == 429, refusal
    body = json.dumps({"new_model_ref": other_model}).encode()
    reloaded = live.request("POST", "/v1/pools/default/reload", body)
    assert reloaded.status == 200, reloaded
    for task_id in waiting:
        assert live.follow(task_id)[-1][0] == "end"


def pool_toml(model: Path, **more: Any) -> str:
    """A configuration with one small CPU pool; ``more`` are lines such as ``capacity=2`` of ``[queue]``."""
    queue = "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items())
    return (
        f"[queue]\n{queue}\n[models]\nroots = [{json.dumps(str(model.parent))}]\n\n[[pools]]\n"
        f'model = {json.dumps(str(model))}\ndevices = ["cpu"]\nslots = 1\nctx = 512\nthreads = 1\n'
    )


def scrape_after_work() -> str:
    """What a real server shows after real work."""
    from testkit.tiny_gguf import write_tiny_llama

    with tempfile.TemporaryDirectory(prefix="metrics-lint-") as name:
        folder = Path(name)
        model = write_tiny_llama(folder / "tiny-a.gguf")
        write_tiny_llama(folder / "tiny-b.gguf", seed=1)
        with serving(folder / "home", pool_toml(model, capacity=2)) as live:
            work(live, other_model="tiny-b")
            return live.metrics()


def _fetch(url: str) -> str:
    token = os.environ.get("ORCHD_TOKEN", "")
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return str(response.read().decode())


def main() -> int:
    """The command; 1 if anything is more, less or different."""
    parser = argparse.ArgumentParser(prog="python -m tools.metrics_lint")
    parser.add_argument("--url", help="lint this server instead of one started here")
    parser.add_argument("--gpu", action="store_true", help="it has GPU replicas")
    options = parser.parse_args()
    text = _fetch(options.url) if options.url else scrape_after_work()
    complaints = lint(text, load(), gpu=options.gpu) + promtool(text)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    samples = sum(not line.startswith("#") for line in text.splitlines())
    print(f"{samples} samples, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
