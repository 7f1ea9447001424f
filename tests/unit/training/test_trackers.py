"""Trackers with their real libraries, offline; what is missing; one that fails."""

from __future__ import annotations

import importlib.util

import pytest
from unit.small import run_config

from dist_ft.core.errors import ConfigError
from dist_ft.training import trackers
from dist_ft.training.trackers import Trackers


def test_mlflow_in_a_folder_goes_on_where_it_was(tmp_path, monkeypatch):
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


def test_wandb_offline_keeps_its_files(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = run_config(
        "runs", log={"wandb": {"project": "p", "mode": "offline", "folder": str(tmp_path / "w")}}
    )
    opened = Trackers.open(config, "runs/r", tmp_path)
    opened.add(1, "train", {"loss": 2.0})
    opened.close()
    assert list((tmp_path / "w").rglob("run-*.wandb")), "what `wandb sync` takes"


def test_what_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = run_config("runs", log={"wandb": {"project": "p"}, "mlflow": {"experiment": "e"}})
    with pytest.raises(ConfigError) as caught:
        Trackers.open(config, "runs/r", tmp_path)
    assert (
        list(caught.value.problems)
        == list(trackers.problems(config))
        == [
            "log.wandb.project=p: wandb is not installed here; it comes with an extra; pip install 'dist-ft[wandb]', or leave log.wandb out",
            "log.mlflow.experiment=e: mlflow is not installed here; it comes with an extra; pip install 'dist-ft[mlflow]', or leave "
            "log.mlflow out",
        ]
    )
    assert not list(trackers.problems(run_config("runs")))


def test_one_that_fails_is_left_alone(caplog):
    told: list[int] = []

    def fail(step, kind, values):
        raise OSError("gone")

    both = Trackers(
        [
            ("bad", fail, lambda: None),
            ("good", lambda step, kind, values: told.append(step), lambda: None),
        ]
    )
    for step in (1, 2):
        both.add(step, "train", {"loss": 1.0})
    assert told == [1, 2] and [record.getMessage() for record in caplog.records] == [
        "bad takes no more metrics (gone); training goes on"
    ]
