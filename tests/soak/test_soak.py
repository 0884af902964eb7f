"""The count, at a length fit for every run of the suite; ``make soak MINUTES=30`` is the campaign."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.campaign import soak
from tests.soak.storm import GRACE_S, storm


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nothing_is_lost_whatever_clients_do(tmp_path: Path) -> None:
    report = await soak(tmp_path, seconds=20)
    print(*report.lines(), sep="\n")
    assert report.faults == []
    assert len(report.ledger.tasks) > 50
    assert {"length", "stop"} <= set(report.ledger.reasons)
    assert {200, 422} <= set(report.ledger.reloads)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_clients_that_vanish_leave_nothing_and_disturb_little(tmp_path: Path) -> None:
    """The bounds are for a busy machine; ``python -m tests.soak.storm`` tells the figures."""
    report = await storm(tmp_path, clients=150, spread_s=1.5, quiet_s=1.5)
    print(report.line)
    assert report.ends == {"cancelled": 150}
    assert report.cleared_s < GRACE_S + 5
    assert report.storm_ms < 5 * report.quiet_ms + 200
