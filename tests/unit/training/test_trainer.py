"""The training loop with a small model, real data, checkpoints on disk and real failures."""

from __future__ import annotations

import io
import logging
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import history
import numpy as np
import pytest
import tiny
from resolved import resolve

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.ledger import read_ledger
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.load import load_config
from dist_ft.core.errors import Interrupted, StorageError
from dist_ft.core.seeds import (
    derive_seed,
)
from dist_ft.core.world import Collectives, World
from dist_ft.engine import schedule
from dist_ft.engine.torch_engine import TorchEngine
from dist_ft.runtime.bootstrap import build_model
from dist_ft.runtime.bootstrap.build_data import build_loaders
from dist_ft.runtime.bootstrap.run_state import build_local_tier
from dist_ft.storage.filesystem import Store
from dist_ft.training.anomaly import AnomalyDetector
from dist_ft.training.callbacks import Callback, CallbackList
from dist_ft.training.components import Components
from dist_ft.training.console import Console
from dist_ft.training.evaluation import evaluate
from dist_ft.training.metrics_log import MetricsLog, read_metrics
from dist_ft.training.result import Result
from dist_ft.training.run_context import RunContext
from dist_ft.training.trainer import Trainer

STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("trainer"), 60)


@dataclass
class Run:
    """A run that a test can start several times."""

    base: Path
    name: str
    changes: dict = field(default_factory=dict)

    def document(self) -> dict:
        held_out = {"data": str(self.base / "data" / "shard-0.jsonl"), "max_samples": 13}
        changes = {
            "schedule": {"epochs": None, "steps": STEPS},
            "checkpoint": {"every_steps": 2, "background": False},
            "evaluation": held_out,
        }
        for section, fields in self.changes.items():
            changes[section] = {**changes.get(section, {}), **fields}
        return tiny.config(self.base, self.name, **changes)

    @property
    def store(self) -> Store:
        return Store(str(self.base / "runs" / self.name))

    def train(self, *callbacks: Callback, **requests) -> tuple[Result, str]:
        """Train from the latest checkpoint; return the result and the console output."""
        config, stream = load_config(self.document()), io.StringIO()
        attempt = discovery.start_attempt(self.store, 1)
        resolved = resolve(config, self.store)
        data = build_loaders(resolved, self.store, World(), Collectives())
        manager = CheckpointManager(
            self.store,
            config.checkpoint,
            World(),
            Collectives(),
            attempt,
            build_local_tier(config, self.store, World(), Collectives()),
        )
        manifest = manager.find_latest()
        built = build_model.build_engine(resolved, World(), manifest is not None)
        module, engine = built.module, built.engine
        if manifest:
            manifest = manager.load(manifest, engine, build_model.tensor_infos(module))
        progress = manifest.progress if manifest else Progress(step=0, optimizer_step=0)
        metrics = MetricsLog(self.store, read_metrics(self.store, progress.step), attempt, False)
        components = Components(
            engine,
            data.training,
            data.evaluation,
            manager,
            metrics,
            World(),
            Collectives(),
            build_model.tensor_infos(module),
            build_model.tied_weights(module),
            AnomalyDetector(config.anomaly),
            self.store,
        )
        trainer = Trainer(
            resolved,
            components,
            RunContext(console=Console(stream), callbacks=CallbackList(callbacks), **requests),
            progress,
            data.training.plan.total_steps(config.schedule),
            manifest.evaluation if manifest else {},
        )
        try:
            return trainer.run(), stream.getvalue()
        finally:
            metrics.close()

    def ledger(self) -> np.ndarray:
        latest = discovery.find_latest(self.store, World(), Collectives())
        return read_ledger(self.store, latest)


def on_commit(call) -> Callback:
    """Return a callback that calls `call(url, metrics)` for each checkpoint in storage."""

    class OnCommit(Callback):
        def on_checkpoint_committed(self, url, metrics):
            call(url, metrics)

    return OnCommit()


@pytest.fixture
def run(base):
    return Run(base, f"run-{uuid4().hex[:8]}")


@pytest.fixture(scope="module")
def uninterrupted(base) -> tuple[list[float], np.ndarray, Result, str]:
    """Losses, ledger, result and console output of a run that is not interrupted."""
    whole = Run(base, "straight")
    result, output = whole.train()
    return history.losses(whole.store.url), whole.ledger(), result, output


def at_steps(*events):
    """Return a request that calls `events[i]` in step i (from 0) and returns its result."""
    step = iter(range(10**6))
    return lambda: bool((dict(enumerate(events)).get(next(step)) or (lambda: False))())


def stop() -> bool:
    return True


def proceed() -> bool:
    return False


def test_run_trains_to_the_last_step(base, uninterrupted):
    losses, ledger, result, output = uninterrupted
    assert (result.step, result.total_steps, len(losses)) == (STEPS, STEPS, STEPS)
    assert result.loss == losses[-1] < losses[0]
    assert result.checkpoint == str(
        base / "runs" / "straight" / "checkpoints" / "step-000000006-a0001"
    )
    lines = output.splitlines()
    assert lines[0] == (
        f"held-out loss at step 0: {result.evaluation_before:.4f} "
        f"(perplexity {np.exp(result.evaluation_before):.2f})"
    )
    assert re.fullmatch(
        r"step 1/6  loss \d\.\d{4}  lr \d\.\d\de-\d\d  grad \d+\.\d\d  "
        r"[\d,]+ tok/s  \d+\.\d\d s/step  "
        r"left \d:\d\d:\d\d",
        lines[1],
    )
    assert lines[-1].startswith(f"held-out loss at step 6: {result.evaluation_after:.4f}")
    assert sorted(set(ledger[:, 0])) == list(range(STEPS))


def test_metrics_follow_schedule_and_plan(base, uninterrupted):
    config = load_config(Run(base, "straight").document())
    lines = [line for line in read_metrics(Run(base, "straight").store) if line["kind"] == "train"]
    rates = [
        config.optimizer.learning_rate * schedule.learning_rate_factor(config.schedule, step, STEPS)
        for step in range(STEPS)
    ]
    assert [line["learning_rate"] for line in lines] == rates
    manifest = discovery.find_latest(Run(base, "straight").store, World(), Collectives())
    assert (
        sum(line["num_target_tokens"] for line in lines) == manifest.progress.num_target_tokens > 0
    )
    assert manifest.progress.num_tokens == uninterrupted[1][:, 5].sum()
    assert manifest.progress.optimizer_step == STEPS


@pytest.mark.parametrize("at", range(1, STEPS))
def test_stop_request_saves_and_the_same_command_resumes(run, uninterrupted, at):
    with pytest.raises(Interrupted) as caught:
        run.train(should_stop=at_steps(*[proceed] * (at - 1), stop))
    where = run.store.full_url(f"checkpoints/step-{at:09d}-a0001")
    assert str(caught.value) == (
        f"stopped at step {at} of {STEPS} as requested; saved as {where}; the same command resumes "
        "from there"
    )
    result, _ = run.train()
    losses, ledger, whole_result, _ = uninterrupted
    assert history.losses(run.store.url) == losses  # to the last bit, dropout included
    assert np.array_equal(run.ledger(), ledger)
    assert replace(result, run_url="", checkpoint="") == replace(
        whole_result, run_url="", checkpoint=""
    )


def test_stop_request_at_the_last_step_has_no_effect(run):
    assert run.train(should_stop=at_steps(*[proceed] * (STEPS - 1), stop))[0].step == STEPS


@pytest.mark.parametrize("background", [True, False])
def test_save_request_commits_that_step_at_once_and_has_no_other_effect(
    run, uninterrupted, background
):
    run.changes["checkpoint"] = {"every_steps": 4, "background": background, "keep_last": 9}
    committed, ended = [], []
    run.train(
        on_commit(lambda url, metrics: committed.append(metrics["step"])),
        should_save=at_steps(proceed, proceed, stop, proceed, stop),
        on_requested_save_end=lambda: ended.append(committed[-1]),
    )
    assert committed == [3, 4, 5, 6] and ended == [3, 5], "ended when committed, not when started"
    assert history.losses(run.store.url) == uninterrupted[0]
    assert np.array_equal(run.ledger(), uninterrupted[1])


def test_save_request_ends_where_storage_fails_too(run, caplog):
    block, free = blocker(run.store)
    ended = []
    result, _ = run.train(
        should_save=at_steps(block, lambda: True, free),
        on_requested_save_end=lambda: ended.append(True),
    )
    assert (
        result.step == STEPS
        and ended == [True]
        and "no checkpoint at step 2, training continues" in caplog.text
    )


def blocker(store: Store):
    """Return (block, free): while blocked, writes below checkpoints/ fail."""
    folder, aside = Path(store.full_url("checkpoints")), Path(store.full_url("aside"))

    def block() -> bool:
        if folder.exists():
            folder.rename(aside)
        folder.write_text("no folder")
        return False

    def free() -> bool:
        folder.unlink()
        if aside.exists():
            aside.rename(folder)
        return False

    return block, free


def test_failed_save_leaves_its_ledger_rows_for_the_next(run, uninterrupted, caplog):
    block, free = blocker(run.store)
    committed = []
    with caplog.at_level(logging.WARNING, "dist_ft"):
        run.train(
            on_commit(lambda url, metrics: committed.append(metrics["step"])),
            should_stop=at_steps(block, proceed, free),
        )
    problems = [text.split(":")[0] for text in caplog.messages]
    assert problems == [
        "checkpoint step-000000002-a0001 was not removed",
        "no checkpoint at step 2, training continues",
    ]
    assert f"{run.store.url}/checkpoints/step-000000002-a0001/" in caplog.text
    assert committed == [4.0, 6.0]
    assert np.array_equal(run.ledger(), uninterrupted[1])
    assert history.losses(run.store.url) == uninterrupted[0]


def test_stop_request_while_storage_fails_reports_that_nothing_is_saved(run, caplog):
    block, free = blocker(run.store)
    with pytest.raises(Interrupted) as caught:
        run.train(should_stop=at_steps(proceed, proceed, lambda: block() or True))
    assert str(caught.value) == (
        "stopped at step 3 of 6 as requested; storage failed, so this step is not saved (the log "
        "says "
        "why); the same command resumes from the checkpoint before"
    )
    free()
    assert discovery.find_latest(run.store, World(), Collectives()).progress.step == 2


def test_last_save_must_not_fail(run):
    block, _ = blocker(run.store)
    with pytest.raises(
        StorageError, match=r"checkpoints/step-000000006-a0001/\S+: cannot write it"
    ):
        run.train(should_stop=at_steps(*[proceed] * (STEPS - 1), block))


def test_callback_gets_url_and_metrics_of_each_checkpoint(run, uninterrupted):
    committed = []
    run.train(on_commit(lambda url, metrics: committed.append((url, metrics))))
    assert [url.rsplit("/", 1)[1] for url, _ in committed] == [
        f"step-{step:09d}-a0001" for step in (2, 4, 6)
    ]
    assert [metrics["loss"] for _, metrics in committed] == [
        uninterrupted[0][1],
        uninterrupted[0][3],
        uninterrupted[0][5],
    ]


@pytest.mark.parametrize(
    ("busy", "warning", "steps"),
    [
        (
            "wait",
            r"the save at step {} waited \d+\.\d s for the previous one; checkpoint.every_steps=1 "
            "is shorter than a save takes",
            range(1, 7),
        ),
        (
            "skip",
            "no checkpoint at step {}: the previous one is still being written; "
            "checkpoint.every_steps=1 is shorter than a "
            "save takes",
            (1, 6),
        ),
    ],
)
def test_background_saves_do_not_accumulate(
    base, uninterrupted, monkeypatch, caplog, busy, warning, steps
):
    seconds = {"wait": 0.3, "skip": 3.0}[
        busy
    ]  # six steps take longer than the first, not than the second
    monkeypatch.setattr(
        Store,
        "write",
        lambda self, path, content, real=Store.write: (
            time.sleep(seconds if path.endswith(".safetensors") else 0),
            real(self, path, content),
        )[1],
    )
    changes = {"every_steps": 1, "background": True, "when_busy": busy, "keep_last": 9}
    run, committed = Run(base, f"busy-{busy}", {"checkpoint": changes}), []
    with caplog.at_level(logging.WARNING, "dist_ft"):
        run.train(
            on_commit(lambda url, metrics: committed.append((metrics["step"], metrics["loss"])))
        )
    assert history.losses(run.store.url) == uninterrupted[0]
    assert np.array_equal(run.ledger(), uninterrupted[1])
    assert committed == [(float(step), uninterrupted[0][step - 1]) for step in steps]
    assert len(caplog.messages) == 4
    assert all(
        re.fullmatch(warning.format(step), text)
        for step, text in zip(range(2, 6), caplog.messages, strict=True)
    )
    assert [
        manifests.parse_folder(name)[0] for name in discovery.list_committed(run.store)
    ] == list(reversed(steps))


def test_failed_background_save_leaves_its_ledger_rows_for_the_next(
    run, uninterrupted, caplog, monkeypatch
):
    def write(self, path, content, real=Store.write):
        if "step-000000002" in self.url and path.endswith(".safetensors"):
            raise StorageError("no room")
        real(self, path, content)

    monkeypatch.setattr(Store, "write", write)
    run.changes["checkpoint"] = {"background": True}
    with caplog.at_level(logging.WARNING, "dist_ft"):
        run.train()
    assert "no checkpoint at step 2, training continues: no room" in caplog.messages
    assert (
        np.array_equal(run.ledger(), uninterrupted[1])
        and history.losses(run.store.url) == uninterrupted[0]
    )


@pytest.mark.parametrize("background", [True, False])
def test_local_checkpoints_between_those_in_storage(base, tmp_path, uninterrupted, background):
    run = Run(
        base,
        f"tiers-{background}".lower(),
        {
            "checkpoint": {
                "every_steps": 4,
                "local_folder": str(tmp_path),
                "local_every_steps": 1,
                "background": background,
                "when_busy": "wait",
            }
        },
    )
    local_steps = []

    class OnLocalCheckpoint(Callback):
        def on_local_checkpoint_committed(self, step):
            local_steps.append(step)

    with pytest.raises(RuntimeError, match="killed"):
        run.train(OnLocalCheckpoint(), should_stop=at_steps(proceed, proceed, killed))
    assert discovery.list_committed(run.store) == [] and local_steps
    calls: list[int] = []
    run.train(should_stop=lambda: bool(calls.append(1)))
    assert len(calls) < STEPS, "it resumed from the local checkpoint"
    assert history.losses(run.store.url) == uninterrupted[0] and np.array_equal(
        run.ledger(), uninterrupted[1]
    )
    steps = [line["step"] for line in read_metrics(run.store) if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def killed() -> bool:
    raise RuntimeError("killed")


def test_auto_interval_follows_the_failure_rate(base, uninterrupted):
    """A failure every 20 ms requires a save after the first step, one every 3 hours does not."""
    often = Run(
        base,
        "often",
        {"checkpoint": {"every_steps": "auto", "failure_interval_s": 0.02, "keep_last": 9}},
    )
    often.train()
    rarely = Run(base, "rarely", {"checkpoint": {"every_steps": "auto", "keep_last": 9}})
    rarely.train()
    assert len(discovery.list_committed(often.store)) >= 2
    assert discovery.list_committed(rarely.store) == ["step-000000006-a0001"]
    for run in (often, rarely):
        assert history.losses(run.store.url) == uninterrupted[0] and np.array_equal(
            run.ledger(), uninterrupted[1]
        )


def test_saves_and_evaluations_happen_only_where_configured(base):
    quiet = Run(
        base,
        "quiet",
        {
            "checkpoint": {"every_steps": 0, "at_end": False},
            "log": {"every_steps": 4},
            "evaluation": {"at_start": False, "at_end": False, "every_steps": 3},
        },
    )
    result, _ = quiet.train()
    assert discovery.list_committed(quiet.store) == [] and result.checkpoint is None
    assert (result.evaluation_before, result.evaluation_after) == (None, None)
    assert [(line["step"], line["kind"]) for line in read_metrics(quiet.store)] == [
        (3, "evaluation"),
        (4, "train"),
        (6, "train"),
        (6, "evaluation"),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_evaluation_counts_each_sample_once_at_every_world_size(base, size, monkeypatch):
    """Ranks run one by one, each over its own share, with the same number of calls."""
    run = Run(base, "straight")
    config = load_config(run.document())
    resolved = resolve(config, run.store)
    loader = build_loaders(resolved, run.store, World(), Collectives()).evaluation
    engine = build_model.build_engine(resolved, World(), resumed=False).engine
    calls: list[int] = []
    whole = evaluate(engine, loader, config.num_lanes, World(), Collectives()).metrics
    loss_sum = engine.loss_sum
    monkeypatch.setattr(
        engine, "loss_sum", lambda batch: (calls.append(batch.lane), loss_sum(batch))[1]
    )
    total, count, per_rank = 0.0, 0.0, []
    for rank in range(size):
        calls.clear()
        values = evaluate(
            engine, loader, config.num_lanes, World(rank, size), Collectives()
        ).metrics
        total, count = (
            total + values["loss"] * values["num_target_tokens"],
            count + values["num_target_tokens"],
        )
        per_rank.append(len(calls))
    assert len(set(per_rank)) == 1  # the same number of calls on every rank, or ZeRO-3 hangs
    assert (
        loader.index.num_samples == 13
        and count == loader.index.total("num_targets") == whole["num_target_tokens"]
    )
    assert total / count == pytest.approx(whole["loss"], rel=1e-6)
    assert whole["perplexity"] == pytest.approx(np.exp(whole["loss"]))


def test_seeds_follow_from_run_seed_step_and_lane(base, monkeypatch):
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        TorchEngine,
        "accumulate",
        lambda self, batches, seeds, *rest, real=TorchEngine.accumulate: (
            seen.append(tuple(seeds)),
            real(self, batches, seeds, *rest),
        )[1],
    )
    Run(base, "seeds").train()
    assert seen == [
        tuple(derive_seed(11, step, lane) for lane in range(5)) for step in range(STEPS)
    ]
    assert len({seed for seeds in seen for seed in seeds}) == 5 * STEPS
