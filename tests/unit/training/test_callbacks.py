"""Callbacks: their order, the ranks they run on, and what an error in one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import tiny
from unit.small import run_config

import dist_ft
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError, Interrupted
from dist_ft.training.callbacks import Callback, CallbackError, CallbackList
from dist_ft.training.run_context import RunContext


class Recorder(Callback):
    """Notes the calls of all methods in `calls`."""

    def __init__(self, name: str, calls: list[tuple]) -> None:
        self._name = name
        self._calls = calls

    def on_step_end(self, step, loss):
        self._calls.append((self._name, "on_step_end", step))

    def on_metrics(self, step, kind, values):
        self._calls.append((self._name, "on_metrics", step, kind))

    def on_evaluation(self, step, metrics):
        self._calls.append((self._name, "on_evaluation", step))

    def on_checkpoint_committed(self, url, metrics):
        self._calls.append((self._name, "on_checkpoint_committed", metrics["step"]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("callbacks"), 60)


def document(base: Path, name: str, workers: int = 0) -> dict:
    """Return a run of two steps with a checkpoint and an evaluation at each end."""
    held_out = {"data": str(base / "data" / "shard-0.jsonl"), "max_samples": 13}
    return tiny.config(
        base,
        name,
        workers=workers,
        schedule={"epochs": None, "steps": 2},
        checkpoint={"every_steps": 0, "background": False},
        evaluation=held_out,
    )


RANK_0_EVENTS = [
    ("on_metrics", 0, "evaluation"),
    ("on_evaluation", 0),
    ("on_metrics", 1, "train"),
    ("on_step_end", 1),
    ("on_metrics", 2, "train"),
    ("on_step_end", 2),
    ("on_metrics", 2, "evaluation"),
    ("on_evaluation", 2),
    ("on_checkpoint_committed", 2.0),
]


def test_callbacks_run_in_order_of_the_list_at_each_event(base):
    calls: list[tuple] = []
    callbacks = [Recorder("first", calls), Recorder("second", calls)]
    result = dist_ft.train(load_config(document(base, "order")), callbacks=callbacks)
    assert result.step == 2
    assert calls == [(name, *event) for event in RANK_0_EVENTS for name in ("first", "second")]


def test_steps_and_checkpoints_reach_all_ranks_and_metrics_rank_0_only(base):
    folder = base / "two-ranks"
    codes = ranks.run_ranks(2, [document(base, "ranks", 2)], folder, env={"PRINT_CALLBACKS": "1"})
    ranks.require_ok(codes, folder)

    def events(rank: int) -> list[tuple]:
        lines = (folder / f"rank-{rank}.log").read_text().splitlines()
        printed = [
            tuple(json.loads(line.removeprefix("callback ")))
            for line in lines
            if line.startswith("callback ")
        ]
        return [event for event in printed if event[0] != "on_metrics" or event[2] != "pace"]

    assert events(0) == RANK_0_EVENTS
    assert events(1) == [
        event for event in RANK_0_EVENTS if event[0] in ("on_step_end", "on_checkpoint_committed")
    ]


def test_callback_that_raises_ends_the_run_and_is_named(base):
    class Broken(Callback):
        def on_step_end(self, step, loss):
            raise KeyError("lost")

    with pytest.raises(CallbackError) as caught:
        dist_ft.train(load_config(document(base, "broken")), callbacks=[Broken()])
    assert str(caught.value) == (
        f"callback {__name__}.{Broken.__qualname__}.on_step_end failed: KeyError: 'lost'. "
        "Committed checkpoints are kept. Fix the callback and run the same command to resume."
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_callbacks_after_one_that_raises_are_not_called():
    class Broken(Callback):
        def on_progress(self):
            raise ValueError("no")

    calls: list[tuple] = []

    class Counter(Callback):
        def on_progress(self):
            calls.append(())

    with pytest.raises(CallbackError):
        CallbackList([Counter(), Broken(), Counter()]).on_progress()
    assert len(calls) == 1


def test_error_of_dist_ft_in_a_callback_is_raised_unchanged():
    class Stopper(Callback):
        def on_local_checkpoint_committed(self, step):
            raise Interrupted("enough")

    with pytest.raises(Interrupted, match=r"^enough$"):
        CallbackList([Stopper()]).on_local_checkpoint_committed(3)


def test_added_callback_runs_before_the_others():
    calls: list[tuple] = []
    context = RunContext(callbacks=CallbackList([Recorder("given", calls)]))
    context.with_callback(Recorder("added", calls)).callbacks.on_step_end(1, 2.0)
    assert [name for name, *_ in calls] == ["added", "given"]


def test_class_instead_of_instance_is_refused():
    with pytest.raises(ConfigError, match=r"not an instance of dist_ft\.Callback"):
        CallbackList([Callback])  # type: ignore[list-item]


def test_callbacks_are_refused_where_the_workers_are_other_processes(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = run_config("runs", cluster={"workers": 2})
    with pytest.raises(ConfigError) as caught:
        dist_ft.train(config, callbacks=[Callback()])
    (problem,) = caught.value.problems
    assert problem.startswith("callbacks: not supported with cluster.workers=2, ")
    assert problem.endswith("Use cluster.workers=0 or torchrun, or remove the callbacks.")


def test_callback_is_public():
    assert dist_ft.Callback is Callback
