"""Fault 21: NaN and spikes on real ranks under ZeRO: all ranks agree, and a replay decides the
same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import history
import numpy as np
import pytest
import ranks
import tiny

BAD = 9
"""The first step (from 0) that has the poisoned sample."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("bad-numbers"))


@pytest.fixture(scope="module")
def sample(base: Path) -> int:
    """Return a sample that rank 1 of two first has at step BAD."""
    folder = base / "clean"
    ranks.require_ok(ranks.run_ranks(2, [document(base, "clean")], folder), folder)
    rows = history.ledger(base / "runs/clean")
    late = rows[(rows[:, 0] == BAD) & (rows[:, 2] >= 3), 3]  # lanes 3 and 4 of five are rank 1's
    return int(next(one for one in late if one not in rows[rows[:, 0] < BAD, 3]))


def document(base: Path, name: str, **changes: Any) -> dict[str, Any]:
    schedule = {"epochs": None, "steps": 14}
    return tiny.config(
        base, name, workers=2, **{"schedule": schedule, "checkpoint": {"every_steps": 4}, **changes}
    )


def run_poisoned(
    base: Path, config: dict[str, Any], poison: str, **env: str
) -> tuple[list[int], str]:
    folder = base / f"{config['run']['name']}-ranks"
    codes = ranks.run_ranks(2, [config], folder, env={"POISON": poison, **env})
    return codes, (folder / "rank-0.log").read_text(errors="replace")


def read_losses_and_norms(run: Path) -> list[tuple[float, float]]:
    return [
        (one["loss"], one["grad_norm"])
        for one in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if one["kind"] == "train"
    ]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fault_21_update_with_nan_is_skipped_again_after_a_crash(
    base: Path, sample: int, stage: int
) -> None:
    config = document(base, f"nan-{stage}", zero={"stage": stage})
    codes, log = run_poisoned(base, config, f"1:{sample}:nan")
    assert codes == [0, 0], log[-3000:]
    run = base / f"runs/nan-{stage}"
    assert f"step {BAD + 1}: the update was skipped: its loss is nan; its " in log
    note = json.loads((run / f"anomalies/step-{BAD:09d}.json").read_text())
    rows = history.ledger(run)
    assert (
        note["samples"] == sorted(set(rows[rows[:, 0] == BAD, 3].tolist()))
        and sample in note["samples"]
    )
    found = read_losses_and_norms(run)
    assert found[BAD][0] is None and all(
        loss is not None and math.isfinite(loss) for loss, _ in found[:BAD] + found[BAD + 1 :]
    )
    if stage == 1:
        again = document(base, "nan-again", zero={"stage": 1})
        (base / "nan-again-once").unlink(missing_ok=True)
        folder = base / "nan-again-ranks"
        died = ranks.start_ranks(
            2,
            [again],
            folder,
            {"POISON": f"1:{sample}:nan", "DIST_FT_FAILPOINT": f"train.step:{BAD + 3}@0"},
        )
        assert -9 in ranks.wait_for_death(died)
        # This time no number is bad, as after a bit that flipped once.
        codes, log = run_poisoned(base, again, "1:-1:1")
        assert codes == [0, 0], log[-3000:]
        assert f"step {BAD + 1}: the update was skipped: an earlier attempt skipped it" in log
        after = [loss for loss, _ in read_losses_and_norms(base / "runs/nan-again")]
        assert after[BAD + 1 :] == [loss for loss, _ in found[BAD + 1 :]], (
            "the history is bit-equal"
        )


def test_fault_21_spike_is_detected_by_norm_and_by_loss(base: Path, sample: int) -> None:
    window = {"window": 6, "action": "skip"}
    by_norm = document(base, "spike-norm", anomaly={**window, "grad_norm_factor": 20.0})
    codes, log = run_poisoned(base, by_norm, f"1:{sample}:1000")
    assert (
        codes == [0, 0] and f"step {BAD + 1}: the update was skipped: its gradient norm is " in log
    ), log[-3000:]
    by_loss = document(base, "spike-loss", anomaly={**window, "loss_factor": 5.0})
    codes, log = run_poisoned(base, by_loss, f"1:{sample}:1000")
    assert codes == [0, 0] and ", above the limit of " in log, log[-3000:]
    assert [loss for loss, _ in read_losses_and_norms(base / "runs/spike-norm")] == [
        loss for loss, _ in read_losses_and_norms(base / "runs/spike-loss")
    ]


def test_fault_21_rollback_skips_the_steps_before_too(base: Path, sample: int) -> None:
    config = document(base, "back", anomaly={"action": "rollback", "rollback_steps": 2})
    codes, log = run_poisoned(base, config, f"1:{sample}:nan")
    assert codes == [0, 0] and "back to step 8" in log, log[-3000:]
    run = base / "runs/back"
    assert sorted(path.name for path in (run / "anomalies").iterdir()) == [
        f"step-{step:09d}.json" for step in (BAD - 1, BAD)
    ]
    clean = [loss for loss, _ in read_losses_and_norms(base / "runs/clean")]
    found = [loss for loss, _ in read_losses_and_norms(run)]
    assert found[:BAD] == clean[:BAD] and found[BAD] is None and len(found) == 14
    assert found[BAD + 1 :] != clean[BAD + 1 :]
    rows = history.ledger(run)
    assert sorted(set(rows[:, 0])) == list(range(14)), "skipped samples are in the ledger once"
    assert len(np.unique(rows[:, [1, 3, 4]], axis=0)) == len(rows)


def test_fault_21_stop_ends_all_ranks_and_names_the_samples(base: Path, sample: int) -> None:
    codes, log = run_poisoned(
        base, document(base, "stop", anomaly={"action": "stop"}), f"1:{sample}:inf"
    )
    assert codes[0] != 0 and codes[1] != 0
    assert (
        f"anomaly.action=stop: step {BAD + 1} has an anomaly: its loss is " in log
        and "samples start with" in log
    ), log[-2000:]
    names = sorted(path.name for path in (base / "runs/stop/checkpoints").iterdir())
    assert names[-1].startswith("step-000000008")


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_fault_21_too_many_anomalies_in_a_row_end_the_run(base: Path, action: str) -> None:
    config = document(
        base,
        f"row-{action}",
        anomaly={"max_consecutive": 2, "action": action},
        checkpoint={"every_steps": 1, "background": False},
        optimizer={"learning_rate": 1e30},
    )
    codes, log = run_poisoned(base, config, "1:-1:1")
    assert codes[0] != 0 and "more than 2 steps in a row" in log, log[-2000:]
