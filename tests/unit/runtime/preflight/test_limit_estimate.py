"""The line on the limits of a run, before and after it has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.load import load_config
from dist_ft.runtime.preflight.limit_estimate import limit_lines


class _Manifest:
    progress = Progress(step=100, optimizer_step=100, trained_s=360.0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run have a checkpoint of 100 steps of 3.6 s."""
    monkeypatch.setattr(discovery, "list_committed", lambda store: ["step-000000100-a0001"])
    monkeypatch.setattr(discovery, "load_manifest", lambda store, name: _Manifest)


def lines(folder: Path, **changes: Any) -> list[str]:
    document: dict[str, Any] = {
        "run": {"name": "x", "storage": str(folder)},
        "model": {"path": "m"},
        "data": {"train": "a.jsonl"},
        "batch": {"global_batch": 4, "sequence_length": 8},
        "schedule": {"steps": 1000},
    }
    for section, fields in changes.items():
        document.setdefault(section, {}).update(fields)
    return list(limit_lines(load_config(document)))


def test_run_without_limits_has_no_line(tmp_path: Path) -> None:
    assert lines(tmp_path) == []


def test_line_of_a_new_run_says_how_long_a_step_may_take(tmp_path: Path) -> None:
    assert lines(tmp_path, run={"max_hours": 0.5}) == [
        "0.50 hours are left to run.max_hours=0.5 on 1 worker: enough for 1,000 steps of at most "
        "1.8 s each, with start, evaluations and saves"
    ]
    assert lines(tmp_path, run={"max_hours": 2}, schedule={"steps": None, "epochs": 1}) == [
        "2.00 hours are left to run.max_hours=2 on 1 worker; whether they suffice is not known "
        "(schedule.epochs)"
    ]


@pytest.mark.usefixtures("trained")
def test_estimate_beyond_the_limit_is_a_warning(tmp_path: Path) -> None:
    assert lines(tmp_path, run={"max_hours": 1.1}) == [
        "1.00 hours are left to run.max_hours=1.1 on 1 worker; the 900 steps left need 0.90 hours "
        "at 3.6 s each, as so far"
    ]
    (line,) = lines(tmp_path, run={"max_hours": 0.6})
    assert line == (
        "WARNING 0.50 hours are left to run.max_hours=0.6 on 1 worker, but the 900 steps left need "
        "0.90 hours at 3.6 s each, as so far; the run would save and stop near step 600 of 1,000. "
        "Raise run.max_hours=0.6, or lower schedule.steps"
    )
    (line,) = lines(tmp_path, run={"max_cost": 9}, cluster={"cost_per_hour": 10, "workers": 2})
    assert line.startswith("WARNING 0.40 hours are left to run.max_cost=9 on 2 workers")


@pytest.mark.usefixtures("trained")
def test_limit_that_is_used_up_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for name, record in {
        "attempts": {"attempt": 1, "world_size": 1, "started_at": "2026-01-01T00:00:00+00:00"},
        "time": {"attempt": 1, "begun_at": "2026-01-01T00:00:00+00:00", "seconds": {"data": 7200}},
    }.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "000001.json").write_text(json.dumps(record))
    assert lines(tmp_path, run={"max_hours": 1.5}) == [
        "WARNING run.max_hours=1.5: reached, with 2.00 hours of 1 attempt; the run will not train; "
        "raise run.max_hours, then run the same command to resume"
    ]
