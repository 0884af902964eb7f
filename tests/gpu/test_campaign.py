"""The campaign's budget, order and cut-off, with parts that are a line of Python each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import campaign as campaign_module
from benchmarks.gpu.campaign import MARK, STOP_S, Campaign, Outcome, main, summary
from benchmarks.gpu.parts import Part, parts


def part(code: str, *, name: str = "p", least_s: float = 0, most_s: float = 60, json: Path | None = None) -> Part:
    command = [sys.executable, "-c", code]
    return Part(name, "a part", command, least_s, most_s, json=json, worth=re.compile("tokens/s"), fine=(0, 4))


def campaign(results: Path, *, left_s: float = 60) -> Campaign:
    return Campaign(results, time.time() + left_s + STOP_S, title="t")


def written(results: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads((results / "figures.json").read_text())["parts"]
    return found


def test_what_a_part_says_is_logged_and_its_figures_are_in_the_results(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    code = f"print('loading'); print('1 stream: 7 tokens/s'); open({str(file)!r}, 'w').write('[7]')"
    outcome = campaign(tmp_path).run(part(code, json=file))
    assert (outcome.state, outcome.lines, outcome.figures) == ("done", ["1 stream: 7 tokens/s"], [7])
    assert "loading\n1 stream" in (tmp_path / "log.txt").read_text()
    assert "1 stream: 7 tokens/s" in (tmp_path / "summary.md").read_text()
    assert written(tmp_path)[0]["figures"] == [7]


def test_every_part_writes_the_results_anew_so_that_a_cut_off_loses_only_what_had_not_begun(tmp_path: Path) -> None:
    running = campaign(tmp_path)
    for number, code in enumerate(("pass", "raise SystemExit(3)", "raise SystemExit(4)")):
        running.run(part(code, name=str(number)))
        assert [(one["part"], one["state"]) for one in written(tmp_path)] == [
            ("0", "done"), ("1", "failed"), ("2", "done"),
        ][: number + 1]  # fmt: skip
    assert "it ended with 3; log.txt has what it said" in (tmp_path / "summary.md").read_text()


def test_a_part_that_needs_more_time_than_is_left_is_not_begun_and_a_shorter_one_is(tmp_path: Path) -> None:
    running = campaign(tmp_path, left_s=30)
    long = running.run(part("pass", least_s=45))
    assert long.state == "not begun"
    assert re.fullmatch(r"(30|29) s were left, and it takes 45 s at least", long.why)
    assert running.run(part("pass", least_s=10)).state == "done"


def test_nothing_is_begun_after_the_budget(tmp_path: Path) -> None:
    outcome = campaign(tmp_path, left_s=-1000).run(part("pass"))
    assert (outcome.state, outcome.why) == ("not begun", "0 s were left, and it takes 0 s at least")


def test_a_part_out_of_time_is_interrupted_keeps_its_figures_and_leaves_no_process(tmp_path: Path) -> None:
    file, pids = tmp_path / "p.json", tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        f"open({str(file)!r}, 'w').write('[1]')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"open({str(pids)!r}, 'w').write(str(child.pid))\n"
        "print('5 tokens/s', flush=True)\n"
        "time.sleep(600)"
    )
    outcome = campaign(tmp_path).run(part(code, most_s=3, json=file))
    assert (outcome.state, outcome.why) == ("out of time", "it was stopped after 3 s")
    assert (outcome.lines, outcome.figures) == (["5 tokens/s"], [1])
    child = Path("/proc", pids.read_text())
    deadline = time.monotonic() + 10
    while child.exists() and (child / "stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the server of a part was left behind"


def test_a_part_that_ignores_the_interrupt_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_module, "STOP_S", 1.0)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    began = time.monotonic()
    assert campaign(tmp_path).run(part(code, most_s=1)).state == "out of time"
    assert time.monotonic() - began < 30


def test_a_campaign_that_is_ended_ends_its_part(tmp_path: Path) -> None:
    environ = {**os.environ, "ORCHD_TEST_MODELS": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "benchmarks.gpu.campaign", "--device", "cpu", "--only", "models"]
    process = subprocess.Popen(
        [*command, "--results", str(tmp_path / "r")], env=environ, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "r" / "log.txt"
    deadline = time.monotonic() + 60
    while not log.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert process.stderr is not None
    assert "cut off; what was measured is in" in process.stderr.read()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert str(tmp_path) not in (folder / "cmdline").read_text()


def test_the_order_is_that_of_importance(tmp_path: Path) -> None:
    names = [one.name for one in parts("gpu:0", tmp_path)]
    assert names == [
        "models", "a-tests", "a-tests-slow", "b-speed-8B", "b-speed-135M", "d-conversations-12", "d-edit-1",
        "d-edit-1-off", "d-json-8", "e-choices",
    ]  # fmt: skip


def test_a_row_that_the_comparison_does_not_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.parts.SCENARIOS", ())
    absent = {one.name: one.absent for one in parts("gpu:0", tmp_path) if one.absent}
    assert absent["d-json-8"] == "benchmarks.compare has no row json-8"
    (one,) = [one for one in parts("gpu:0", tmp_path) if one.name == "d-json-8"]
    assert campaign(tmp_path).run(one).state == "not there"


def test_an_owner_s_model_takes_the_place_of_the_synthetic_one(tmp_path: Path) -> None:
    chosen = parts("gpu:1", tmp_path, model=Path("/m/mine.gguf"))
    assert "8B-Q4_K-0" not in chosen[0].command
    assert [one.name for one in chosen if "/m/mine.gguf" in one.command] == [
        "b-speed-mine", "d-conversations-12", "d-edit-1", "d-edit-1-off", "d-json-8", "e-choices",
    ]  # fmt: skip
    assert all(one.environment["CUDA_VISIBLE_DEVICES"] == "1" for one in chosen if one.name.startswith("d-"))


def test_a_wrong_name_is_refused_with_the_right_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "x", "--results", str(tmp_path)]) == 2
    assert "there is no part 'x'; they are: models, a-tests" in capsys.readouterr().err


def test_the_list_names_the_parts_and_runs_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--results", str(tmp_path / "r")]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("models ")
    assert not (tmp_path / "r").exists()


def test_the_summary_says_why_a_part_is_not_done() -> None:
    text = summary("orchd on gpu:0", [Outcome(part("pass", name="e"), "not begun", why="9 s were left")])
    assert "| e | a part | not begun | 0 |" in text
    assert "not begun: 9 s were left" in text
    assert MARK
