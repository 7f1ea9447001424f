"""Checks before a run: each alone, all at once, and nothing left behind."""

from __future__ import annotations

import json
import os

import pytest

from dist_ft.config.load import STORED, inspect_config, load_config, resolved_yaml
from dist_ft.runtime.preflight import check_run
from dist_ft.storage.filesystem import Store


@pytest.fixture
def base(shared, tmp_path, monkeypatch):
    """A run all is well with."""
    for name in ("RAY_ADDRESS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "once upon a time"}) + "\n")
    return {
        "run": {"name": "x", "storage": str(tmp_path / "deep" / "runs")},
        "model": {"path": str(shared("models/stories260k")), "dtype": "float32"},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "batch": {"global_batch": 64, "sequence_length": 64},
        "schedule": {"steps": 3},
    }


def lines(base, *overrides):
    return check_run.check(load_config(base, overrides))


def test_good_config_has_no_problems_and_leaves_nothing_behind(base, tmp_path):
    assert lines(base) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_existing_folders_are_kept(base, tmp_path):
    (tmp_path / "deep" / "runs").mkdir(parents=True)
    assert lines(base) == []
    assert list((tmp_path / "deep" / "runs").iterdir()) == []


def test_missing_model_is_reported_once(base):
    assert lines(base, "model.path=/no/model") == [
        "model.path=/no/model: the folder does not exist. Give a model folder, an fsspec URL of one, or a "
        "hub name such as org/name."
    ]


def test_sequence_longer_than_the_model_accepts_is_reported(base):
    path = base["model"]["path"]
    assert lines(base, "batch.sequence_length=513") == [
        f"batch.sequence_length=513: longer than the model accepts. At most 512 tokens are "
        f"allowed (max_position_embeddings of {path}). Lower it, or choose another model."
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "tuning={method: partial, last_layers: 6}",
            "tuning.last_layers=6: the model has 5 layers. Use at most 5.",
        ),
        (
            "tuning={method: partial, trainable: 'lmhead.*'}",
            "tuning.trainable=lmhead.*: no weight matches this pattern. The model has",
        ),
        (
            "tuning={method: lora, lora: {targets: q_prj}}",
            "tuning.lora.targets=['q_prj']: peft cannot add adapters to this model",
        ),
        ("tuning={method: lora, lora: {dora: true}}", None),
    ],
)
def test_tuning_targets_must_exist_in_the_model(base, override, message):
    found = lines(base, override)
    assert [message is not None and line.startswith(message) for line in found] == [True] * bool(
        message
    )
    if message:
        assert len(lines(base, override, "model.path=/no/model")) == 1


def test_every_missing_source_is_reported(base, tmp_path):
    found = lines(
        base,
        f"data.train=[{tmp_path}/none.jsonl, {tmp_path}/a.jsonl, {tmp_path}/no*.parquet]",
        f"evaluation.data={tmp_path}/gone.txt",
    )
    assert [line.split(": ")[0] for line in found] == [
        f"data.train={tmp_path}/none.jsonl",
        f"data.train={tmp_path}/no*.parquet",
        f"evaluation.data={tmp_path}/gone.txt",
    ]


def test_shard_in_two_sources_is_reported(base, tmp_path):
    found = lines(base, f"data.train=[{tmp_path}/a.jsonl, {tmp_path}/*.jsonl]")
    assert found == [
        f"data.train: the shard {tmp_path}/a.jsonl is listed twice. Each sample counts once per epoch. Remove "
        "the source that overlaps."
    ]


def test_unwritable_storage_is_reported(base, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (found,) = lines(base, f"run.storage={tmp_path}/file")
    assert found.startswith(f"run.storage={tmp_path}/file: {tmp_path}/file/x/.probe-")
    assert "cannot write it" in found
    assert (
        check_run.check(load_config(base, [f"run.storage={tmp_path}/file"]), write_storage=False)
        == []
    )


def test_older_run_with_another_identity_is_reported(base, tmp_path):
    store = Store(load_config(base).run_url)
    store.write(STORED, resolved_yaml(load_config(base)).encode())
    assert lines(base, "cluster.workers=2", "optimizer.learning_rate=1e-3") == []
    assert lines(base, "run.seed=3") == [
        "run.seed=3: the stored run 'x' has 0, and this must not change when a run is resumed. Restore 0, or "
        "use another run.name."
    ]
    assert store.list() == ["run.yaml"]


def test_too_few_cpus_are_reported(base, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert lines(base, "cluster.workers=3") == [
        "cluster.workers=3: needs 3 × 1 CPUs (cluster.cpus_per_worker), and this machine has 2. Use fewer "
        "workers or fewer CPUs per worker, or set cluster.address to a larger Ray cluster."
    ]
    assert lines(base, "cluster.workers=3", "cluster.cpus_per_worker=0.5") == []
    assert lines(base, "cluster.workers=2..3", "checkpoint.every_steps=2") == [], (
        "an elastic run takes what there is"
    )
    assert lines(base, "cluster.workers=3", "cluster.address=auto") == [], (
        "another machine's business"
    )


def test_missing_gpus_are_reported(base, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert lines(base, "cluster.gpus_per_worker=1") == []
    assert lines(base, "cluster.gpus_per_worker=1", "cluster.workers=2") == [
        "cluster.gpus_per_worker=1: 2 GPUs are needed, and this machine has 1 that torch can use. "
        "Set it to 0 to run on CPUs, or set cluster.address to a Ray cluster with GPUs."
    ]


def test_only_torchrun_ranks_of_this_machine_count(base, monkeypatch):
    """Two nodes of four processes each."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    many = ["cluster.workers=8", "cluster.gpus_per_worker=1"]
    assert lines(base, *many) == []
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [line[:68] for line in lines(base, *many)] == [
        "cluster.gpus_per_worker=1: 4 GPUs are needed, and this machine has 2"
    ], "RAY_ADDRESS makes no difference"


def test_storage_without_conditional_writes_is_reported(base, monkeypatch):
    """An S3 server that does not know If-None-Match: nothing would keep an older start from committing."""
    monkeypatch.setattr(
        Store, "create", lambda self, path, content: (self.write(path, content), True)[1]
    )
    (found,) = lines(base)
    assert "storage with conditional writes (If-None-Match) is allowed" in found
    assert not os.path.exists(base["run"]["storage"]), "nothing left behind"


def test_all_problems_are_reported_at_once(base, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    (tmp_path / "file").write_text("in the way")
    found = lines(
        base,
        "model.path=/no/model",
        "data.train=/none.jsonl",
        "evaluation.data=/gone.jsonl",
        f"run.storage={tmp_path}/file",
        "cluster.workers=50",
    )
    assert [line.split("=")[0] for line in found] == [
        "model.path",
        "data.train",
        "evaluation.data",
        "cluster.workers",
        "run.storage",
    ]


def test_config_with_broken_fields_is_checked_as_far_as_possible(base):
    config, problems, _ = inspect_config(
        base, ["batch.sequence_length=x", "model.path=/no/model", "run.name=NO"]
    )
    assert len(problems) == 2
    assert [line.split("=")[0] for line in check_run.check(config, is_complete=False)] == [
        "model.path"
    ]


def test_notifications_that_cannot_work_from_here_are_reported(base, monkeypatch):
    monkeypatch.delenv("MY_HOOK", raising=False)
    assert lines(base, "log.notify={command: [sh, -c, 'true'], webhook_env: ''}") == []
    assert lines(base, "log.notify={command: [/no/such], webhook_env: MY_HOOK}") == [
        "log.notify.webhook_env=MY_HOOK: this environment variable is not set here. It must hold "
        "the URL of the webhook. Set it, or remove the field.",
        "log.notify.command: /no/such is no program that can be run here. Allowed: the path of a "
        "program, or the name of one in PATH. Correct it, or make the file executable.",
    ]
    monkeypatch.setenv("MY_HOOK", "ftp://host/s3cret")
    (line,) = lines(base, "log.notify.webhook_env=MY_HOOK")
    assert line.startswith("log.notify.webhook_env=MY_HOOK: the variable does not hold an http")
    assert "s3cret" not in line
    monkeypatch.setenv("MY_HOOK", "https://host/s3cret")
    assert lines(base, "log.notify.webhook_env=MY_HOOK") == []

    # A submitted job sends its notices from the cluster.
    config = load_config(base, ["log.notify.command=[/no/such]"])
    assert check_run.check(config, write_storage=False) == []
