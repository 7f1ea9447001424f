"""What a run's storage says happened, and whether it is what should have happened."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dist_ft.checkpoint import catalogue
from dist_ft.checkpoint.ledger import read_ledger
from dist_ft.config.load import load_config
from dist_ft.data import index as indices
from dist_ft.data.plan import Plan
from dist_ft.storage import Store


def losses(run: str | Path) -> list[float]:
    """Return the training losses, step by step; every step must be there once."""
    lines = [json.loads(line) for line in Store(str(run)).read("metrics.jsonl").splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, len(train) + 1))
    return [line["loss"] for line in train]


def ledger(run: str | Path) -> np.ndarray:
    """Return the committed ledger's rows."""
    store = Store(str(run))
    return read_ledger(store, catalogue.load_manifest(store, catalogue.committed(store)[0]))


def require_exactly_once(run: str | Path, document: dict[str, Any]) -> None:
    """Fail unless the ledger holds, step by step, just the plan's pieces, and each epoch every piece once."""
    config = load_config(document)
    index = indices.load(Store(str(run)), "data/data.train")
    assert index is not None
    plan = Plan(index, config.data, config.batch, config.run.seed)
    rows, total = ledger(run), plan.total_steps(config.schedule)
    assert sorted(set(rows[:, 0])) == list(range(total))
    for step in range(total):
        consumed = rows[rows[:, 0] == step][:, 3:]
        planned = plan.samples_seen(step)
        assert sorted(map(tuple, consumed)) == sorted(map(tuple, planned)), f"step {step}"
    for epoch in range(config.schedule.epochs or 0):
        counts = Counter(map(tuple, rows[rows[:, 1] == epoch][:, 3:]))
        assert set(counts.values()) == {1} and len(counts) == index.num_pieces, f"epoch {epoch}"
