"""The number of rollbacks to one checkpoint is limited."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
from unit.small import run_config

from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.core.world import Collectives, World
from dist_ft.runtime.bootstrap import training_run
from dist_ft.training.anomaly import AnomalyDetector, AnomalyError, RollbackRequested
from dist_ft.training.components import Components
from dist_ft.training.run_context import RunContext


class Diverging:
    """A run that has an anomaly after each rollback, whatever is skipped."""

    starts = 0

    def __init__(self, *_) -> None:
        Diverging.starts += 1

    def run(self):
        raise RollbackRequested


def parts(config, manifest) -> Components:
    manager = MagicMock()
    manager.find_latest.return_value = manager.load.return_value = manifest
    return Components(
        MagicMock(),
        MagicMock(),
        None,
        manager,
        None,
        World(),
        Collectives(),
        {},
        {},
        AnomalyDetector(config.anomaly),
        MagicMock(),
    )


def test_rollbacks_to_the_same_checkpoint_are_limited(monkeypatch):
    monkeypatch.setattr(training_run, "Trainer", Diverging)
    config, progress = (
        run_config("runs", anomaly={"max_consecutive": 3, "action": "rollback"}),
        Progress(step=8, optimizer_step=8),
    )
    manifest = MagicMock(progress=progress, evaluation={}, cursors="")
    with pytest.raises(
        AnomalyError, match=r"rolled back to step 8 more than 3 times \(anomaly.max_consecutive\)"
    ):
        training_run.train_with_rollback(
            ResolvedRun.from_config(config),
            parts(config, manifest),
            RunContext(),
            progress,
            20,
            manifest,
        )
    assert Diverging.starts == 4


def test_rollback_without_a_checkpoint_is_an_error(monkeypatch):
    monkeypatch.setattr(training_run, "Trainer", Diverging)
    config = run_config("runs", anomaly={"action": "rollback"})
    with pytest.raises(
        AnomalyError,
        match=r"the run has no checkpoint yet to roll back to\. The same command starts again",
    ):
        training_run.train_with_rollback(
            ResolvedRun.from_config(config),
            parts(config, None),
            RunContext(),
            Progress(step=0, optimizer_step=0),
            20,
            None,
        )
