"""A finished run that is extended continues where it stood, and skips no sample."""

from __future__ import annotations

import pytest
import tiny

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.runs.ledger_audit import audit


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"epochs": 1}, {"epochs": 3}),
        ({"epochs": None, "steps": 9}, {"epochs": 2}),
        ({"epochs": 1}, {"epochs": None, "steps": 40}),
    ],
)
@pytest.mark.parametrize("sources", [1, 2])
def test_promise_1_holds_when_a_finished_run_is_extended(tmp_path, first, then, sources):
    base = tiny.base(tmp_path, samples=47)
    tiny.make_data(base / "more", 23, seed=5)
    train = [str(base / "data" / "*.jsonl"), str(base / "more" / "*.jsonl")][:sources]
    for schedule in (first, then):
        document = tiny.config(
            base, "longer", data={"train": train}, schedule={"warmup_steps": 1, **schedule}
        )
        api.train(load_config(document), skip_check=True)
    found = audit(load_config(document).run_url)
    assert found.is_sound, [count for count in found.epochs if not count.is_sound]
    assert any(count.num_seen == count.num_segments for count in found.epochs if count.epoch == 1)
