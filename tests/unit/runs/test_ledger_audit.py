"""The audit passes if each sample counted once, and otherwise names the lost and repeated ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.core.errors import DataError
from dist_ft.runs import ledger_audit as module
from dist_ft.runs.ledger_audit import audit, describe, verify_shards


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two epochs over two sources, in two attempts."""
    base = tiny.base(tmp_path_factory.mktemp("audit"), samples=60)
    tiny.make_data(base / "more", 20, seed=5)
    document = tiny.config(
        base,
        "audited",
        checkpoint={"every_steps": 3},
        data={
            "train": [
                {"path": str(base / "data" / "*.jsonl"), "name": "main"},
                {"path": str(base / "more" / "*.jsonl"), "repeat": 2},
            ]
        },
    )
    first = load_config(document | {"schedule": {"steps": 5, "name": "constant"}})
    api.train(first, skip_check=True)
    config = load_config(document)
    api.train(config, skip_check=True)
    return config


def test_a_sound_run_passes(run):
    found = audit(run.run_url)
    assert found.is_sound and found.attempts == 2
    assert [(c.source, c.epoch, c.num_segments, c.num_seen) for c in found.epochs] == [
        ("main", 0, 60, 60),
        ("main", 1, 60, 60),
        *(("source-1", epoch, 20, 20) for epoch in range(4)),
    ]
    text = describe(found)
    assert "main, epoch 1: all 60 segments once, 0 lost, 0 repeated" in text and text.endswith(
        "exactly once: yes"
    )
    assert verify_shards(run.run_url) == 6


def test_stacks_of_hung_workers_are_no_attempts(run):
    stacks = Path(run.run_url) / "attempts/000002-rank-00001-stacks.txt"
    stacks.write_text("Thread ...")
    assert audit(run.run_url).attempts == 2
    stacks.unlink()


@pytest.mark.parametrize(
    ("corrupt", "expected"),
    [
        (
            lambda rows: np.delete(rows, 3, axis=0),
            r": 59 of 60 segments once, 1 lost, 0 repeated|: 19 of 20 segments once, 1 lost",
        ),
        (lambda rows: np.concatenate([rows, rows[:2]]), r"[12] repeated"),
    ],
)
def test_lost_and_repeated_segments_are_reported(run, monkeypatch, corrupt, expected):
    read = module.read_history

    def corrupted(store, manifest):
        history = read(store, manifest)
        return history._replace(samples=corrupt(history.samples))

    monkeypatch.setattr(module, "read_history", corrupted)
    found = audit(run.run_url)
    assert not found.is_sound
    text = describe(found)
    assert text.endswith("exactly once: NO")
    import re

    assert re.search(expected, text)


def test_no_run_and_no_checkpoint_are_errors(tmp_path):
    with pytest.raises(
        DataError,
        match=r"not a run \(it has no run.yaml\). Give the folder <run.storage>/<run.name>",
    ):
        audit(str(tmp_path))
    base = tiny.base(tmp_path / "b", samples=12)
    config = load_config(
        tiny.config(
            base, "none", schedule={"epochs": None, "steps": 2}, checkpoint={"at_end": False}
        )
    )
    api.train(config, skip_check=True)
    with pytest.raises(DataError, match="no checkpoint yet, so there is nothing to verify"):
        audit(config.run_url)
