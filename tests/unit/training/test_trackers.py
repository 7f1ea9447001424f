"""Trackers with their real libraries, offline; what is missing; one that fails."""

from __future__ import annotations

import importlib.util

import pytest
from unit.small import run_config

from dist_ft.core.errors import ConfigError
from dist_ft.training import trackers
from dist_ft.training.trackers import Tracker, Trackers


def test_mlflow_in_a_folder_resumes_its_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # newer versions keep folders in maintenance
    uri = (tmp_path / "ml").as_uri()
    config = run_config("runs", log={"mlflow": {"experiment": "fine-tuning", "tracking_uri": uri}})
    for steps in ((1, 2), (3,)):
        opened = Trackers.open(config, "s3://b/runs/r", tmp_path)
        for step in steps:
            opened.add(step, "train", {"loss": 6.0 / step, "bad": float("nan")})
        opened.close()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("fine-tuning").experiment_id])
    assert [
        (one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")
    ] == [(1, 6.0), (2, 3.0), (3, 2.0)]
    assert run.info.status == "FINISHED" and "train/bad" not in run.data.metrics


def test_wandb_offline_stores_its_files(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_config(
        "runs", log={"wandb": {"project": "p", "mode": "offline", "folder": str(tmp_path / "w")}}
    )
    opened = Trackers.open(config, "runs/r", tmp_path)
    opened.add(1, "train", {"loss": 2.0})
    opened.close()
    assert list((tmp_path / "w").rglob("run-*.wandb")), "what `wandb sync` takes"


def test_trackers_that_are_not_installed_are_one_line_each(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = run_config("runs", log={"wandb": {"project": "p"}, "mlflow": {"experiment": "e"}})
    with pytest.raises(ConfigError) as caught:
        Trackers.open(config, "runs/r", tmp_path)
    assert (
        list(caught.value.problems)
        == list(trackers.missing_trackers(config))
        == [
            "log.wandb.project=p: wandb is not installed. It comes with an extra. Run pip install "
            "'dist-ft[wandb]', or leave log.wandb out.",
            "log.mlflow.experiment=e: mlflow is not installed. It comes with an extra. Run pip "
            "install "
            "'dist-ft[mlflow]', or leave log.mlflow out.",
        ]
    )
    assert not list(trackers.missing_trackers(run_config("runs")))


def test_tracker_that_fails_is_not_used_again(caplog):
    steps: list[int] = []

    def fail(step, kind, values):
        raise OSError("gone")

    both = Trackers(
        [
            Tracker("bad", fail, lambda: None),
            Tracker("good", lambda step, kind, values: steps.append(step), lambda: None),
        ]
    )
    for step in (1, 2):
        both.add(step, "train", {"loss": 1.0})
    assert steps == [1, 2] and [record.getMessage() for record in caplog.records] == [
        "bad gets no more metrics (gone); training continues"
    ]
