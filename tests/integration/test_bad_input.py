"""What users get wrong, through the real command line: one clear line each, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import history
import pytest
import tiny
import yaml

from dist_ft.checkpoint import commit, manifest
from dist_ft.cli import main

Train = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("bad-input"), samples=24)


@pytest.fixture
def dist_ft(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Train:
    """Return a function that runs a command on a document and returns exit code and stderr."""

    def run(command: str, document: dict[str, Any], *overrides: str) -> tuple[int, str]:
        path = base / f"{document['run']['name']}.yaml"
        path.write_text(yaml.safe_dump(document))
        monkeypatch.setattr("sys.argv", ["dist-ft", command, str(path), *overrides])
        with pytest.raises(SystemExit) as ended:
            main.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(ended.value.code or 0), captured.err

    return run


def short(base: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    return tiny.config(base, name, **{"schedule": {"epochs": None, "steps": 2}, **changes})


def test_missing_model_is_an_error(base: Path, dist_ft: Train) -> None:
    code, said = dist_ft("train", short(base, "no-model", model={"path": str(base / "modell")}))
    assert code == 2 and f"model.path={base}/modell: the folder does not exist" in said


def test_empty_data_set_is_an_error(base: Path, dist_ft: Train) -> None:
    (base / "empty").mkdir()
    code, said = dist_ft(
        "train", short(base, "no-data", data={"train": str(base / "empty" / "*.jsonl")})
    )
    assert code == 2 and "data.train=" in said and "empty/*.jsonl" in said


def test_sample_longer_than_the_sequence_is_an_error(base: Path, dist_ft: Train) -> None:
    code, said = dist_ft(
        "train", short(base, "too-long", data={"overlong": "error"}), "batch.sequence_length=16"
    )
    assert code == 2 and "longer than batch.sequence_length=16" in said and "data.overlong=" in said


def test_shard_that_vanished_or_changed_is_an_error(base: Path, dist_ft: Train) -> None:
    data = base / "data-vanishing"
    glob = tiny.make_data(data, 24)
    document = short(base, "vanishing", data={"train": glob})
    assert dist_ft("train", document)[0] == 0
    gone = data / "shard-1.jsonl"
    content = gone.read_bytes()
    gone.unlink()
    code, said = dist_ft("train", document, "schedule.steps=4")
    assert code == 2 and "shard-1.jsonl" in said
    gone.write_bytes(content + b'{"prompt": "one", "response": "more"}\n')
    code, said = dist_ft("train", document, "schedule.steps=4")
    assert code == 2 and "shard-1.jsonl" in said and "changed" in said


def test_read_only_storage_is_an_error(base: Path, dist_ft: Train) -> None:
    (base / "a-file").write_text("")
    code, said = dist_ft("train", short(base, "no-storage"), f"run.storage={base}/a-file/runs")
    assert code in (1, 2) and "a-file" in said


def test_more_workers_than_ray_can_place_is_an_error(
    base: Path, dist_ft: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = os.cpu_count() or 1
    document = short(
        base,
        "many-workers",
        cluster={"workers": cores + 1, "cpus_per_worker": 1},
        batch={"global_batch": cores + 1},
    )
    code, said = dist_ft("train", document)
    assert code == 2 and f"cluster.workers={cores + 1}" in said


def test_more_workers_than_lanes_is_an_error(base: Path, dist_ft: Train) -> None:
    code, said = dist_ft("check", short(base, "few-lanes", cluster={"workers": 6}))
    assert code == 2 and "cluster.workers=6" in said and "5 lanes" in said


def test_same_run_name_with_another_config_is_an_error(base: Path, dist_ft: Train) -> None:
    dist_ft("train", short(base, "twice"))
    before = sorted((base / "runs/twice/checkpoints").iterdir())
    code, said = dist_ft(
        "train", short(base, "twice", run={"seed": 12}), "batch.sequence_length=32"
    )
    assert (
        code == 2
        and "run.seed=12" in said
        and "batch.sequence_length=32" in said
        and "run.name" in said
    )
    assert sorted((base / "runs/twice/checkpoints").iterdir()) == before


def test_two_runs_in_one_folder_do_not_mix(base: Path, dist_ft: Train) -> None:
    """The same command started twice: the later run continues, the earlier one stops itself, nothing is lost or repeated."""
    document = tiny.config(
        base, "both", schedule={"epochs": None, "steps": 1500}, checkpoint={"every_steps": 10}
    )
    run, path = base / "runs/both", base / "both-first.yaml"
    path.write_text(yaml.safe_dump(document))
    first = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 120
        while (
            not list(run.glob("checkpoints/*/manifest.json"))
            and first.poll() is None
            and time.monotonic() < until
        ):
            time.sleep(0.05)
        code, _ = dist_ft("train", document, "schedule.steps=300")
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    last = [line for line in said.splitlines() if line.startswith("dist-ft: ")]
    assert code == 0 and first.returncode == 1 and "Traceback" not in said
    assert (
        len(last) == 1
        and "attempt 1 must not commit, attempt 2 has taken over the run; this process ends"
        in last[0]
    )
    assert len(history.losses(run)) == 300
    steps = history.ledger(run)[:, 0]
    assert sorted(set(steps)) == list(range(300)) and len(history.ledger(run)) == len(
        {tuple(row) for row in history.ledger(run)}
    )


def test_changed_tokenizer_is_an_error(base: Path, dist_ft: Train) -> None:
    model = tiny.make_model(base / "model-retokenised")
    document = short(base, "retokenised", model={"path": str(model)})
    assert dist_ft("train", document)[0] == 0
    before = sorted((base / "runs/retokenised/checkpoints").iterdir())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, said = dist_ft("train", document, "schedule.steps=4")
    assert (
        code == 2
        and "samples become other tokens than when the run started" in said
        and "another run.name" in said
    )
    assert sorted((base / "runs/retokenised/checkpoints").iterdir()) == before


def test_checkpoint_of_a_newer_version_is_an_error(
    base: Path, dist_ft: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = short(base, "newer")
    with monkeypatch.context() as patch:
        patch.setattr(commit, "_format_version", lambda written: manifest.FORMAT_VERSION + 1)
        assert dist_ft("train", document)[0] == 0
    before = sorted((base / "runs/newer/checkpoints").iterdir())
    code, said = dist_ft("train", document, "schedule.steps=4")
    assert (
        code == 1
        and "is newer than this dist_ft supports" in said
        and said.endswith(". Update dist_ft.\n")
    )
    assert sorted((base / "runs/newer/checkpoints").iterdir()) == before


def test_successful_run_prints_nothing_on_stderr_and_is_complete_the_second_time(
    base: Path, dist_ft: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    document = short(base, "sound")
    assert dist_ft("train", document)[0] == 0
    lines = [
        json.loads(line) for line in (base / "runs/sound/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == [1, 2]
    assert dist_ft("train", document) == (0, "")
