"""Reads what happened in a run from its storage, and checks it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resolved import loaders

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.ledger import read_ledger
from dist_ft.config.load import load_config
from dist_ft.storage.filesystem import Store


def losses(run: str | Path) -> list[float]:
    """Return the training losses, step by step; every step must occur once."""
    lines = [json.loads(line) for line in Store(str(run)).read("metrics.jsonl").splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    return [line["loss"] for line in train]


def ledger(run: str | Path) -> np.ndarray:
    """Return the committed ledger's rows."""
    store = Store(str(run))
    return read_ledger(store, discovery.load_manifest(store, discovery.list_committed(store)[0]))


def require_same(run: Path, other: Path) -> None:
    """Fail unless two runs of any worlds used the same samples at each step, with losses within
    1e-5."""
    assert losses(run) == pytest.approx(losses(other), abs=1e-5)
    assert sorted(map(tuple, ledger(run).tolist())) == sorted(map(tuple, ledger(other).tolist()))


def require_exactly_once(run: str | Path, document: dict[str, Any]) -> None:
    """Fail unless the ledger holds the plan's segments of each step, and every segment once an
    epoch."""
    config = load_config(document)
    data = loaders(config, Store(str(run)))
    try:
        loader, rows = data.training, ledger(run)
        total = loader.plan.total_steps(config.schedule)
        assert sorted(set(rows[:, 0])) == list(range(total))
        for step in range(total):
            consumed = rows[rows[:, 0] == step][:, [2, 3, 4, 5, 1]]
            planned = [
                (batch.lane, *segment)
                for batch in loader.batches(step, range(config.num_lanes))
                for segment in batch.segments.tolist()
            ]
            assert sorted(map(tuple, consumed.tolist())) == sorted(planned), f"step {step}"
        for epoch in range(config.schedule.epochs or 0):
            counts = Counter(map(tuple, rows[rows[:, 1] == epoch][:, 3:].tolist()))
            assert set(counts.values()) == {1} and len(counts) == loader.index.total(
                "num_segments"
            ), f"epoch {epoch}"
    finally:
        data.close()
