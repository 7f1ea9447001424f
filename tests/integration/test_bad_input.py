"""What users get wrong, through the real command line: one clear line each, the right exit code, nothing lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from dist_ft import cli

Train = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("bad-input"), samples=24)


@pytest.fixture
def dist_ft(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Return a function that runs a command on a document and returns exit code and stderr."""
    def run(command: str, document: dict[str, Any], *overrides: str) -> tuple[int, str]:
        path = base / f"{document['run']['name']}.yaml"
        path.write_text(yaml.safe_dump(document))
        monkeypatch.setattr("sys.argv", ["dist-ft", command, str(path), *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return int(ended.value.code or 0), captured.err

    return run


def short(base: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    return tiny.config(base, name, **{"schedule": {"epochs": None, "steps": 2}, **changes})


def test_no_such_model(base: Path, dist_ft: Train) -> None:
    code, said = dist_ft("train", short(base, "no-model", model={"path": str(base / "modell")}))
    assert code == 2 and f"model.path={base}/modell: there is no such folder" in said


def test_an_empty_data_set(base: Path, dist_ft: Train) -> None:
    (base / "empty").mkdir()
    code, said = dist_ft("train", short(base, "no-data", data={"train": str(base / "empty" / "*.jsonl")}))
    assert code == 2 and "data.train=" in said and "empty/*.jsonl" in said


def test_a_sample_longer_than_the_sequence(base: Path, dist_ft: Train) -> None:
    code, said = dist_ft("train", short(base, "too-long", data={"overlong": "error"}), "batch.sequence_length=16")
    assert code == 2 and "longer than batch.sequence_length=16" in said and "data.overlong=" in said


def test_a_shard_that_vanished_or_changed_since_the_run_began(base: Path, dist_ft: Train) -> None:
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


def test_storage_that_can_not_be_written(base: Path, dist_ft: Train) -> None:
    (base / "a-file").write_text("")
    code, said = dist_ft("train", short(base, "no-storage"), f"run.storage={base}/a-file/runs")
    assert code in (1, 2) and "a-file" in said


def test_more_workers_than_there_are(base: Path, dist_ft: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = os.cpu_count() or 1
    document = short(base, "many-workers", cluster={"workers": cores + 1, "cpus_per_worker": 1},
                     batch={"global_batch": cores + 1})
    code, said = dist_ft("train", document)
    assert code == 2 and f"cluster.workers={cores + 1}" in said


def test_more_workers_than_lanes(base: Path, dist_ft: Train) -> None:
    code, said = dist_ft("check", short(base, "few-lanes", cluster={"workers": 6}))
    assert code == 2 and "cluster.workers=6" in said and "5 lanes" in said


def test_a_second_run_of_the_same_name_with_another_config(base: Path, dist_ft: Train) -> None:
    dist_ft("train", short(base, "twice"))
    before = sorted((base / "runs/twice/checkpoints").iterdir())
    code, said = dist_ft("train", short(base, "twice", run={"seed": 12}), "batch.sequence_length=32")
    assert code == 2 and "run.seed=12" in said and "batch.sequence_length=32" in said and "run.name" in said
    assert sorted((base / "runs/twice/checkpoints").iterdir()) == before


def test_a_sound_run_says_nothing_on_stderr_and_is_complete_when_asked_again(
        base: Path, dist_ft: Train, capsys: pytest.CaptureFixture[str]) -> None:
    document = short(base, "sound")
    assert dist_ft("train", document)[0] == 0
    lines = [json.loads(line) for line in (base / "runs/sound/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert dist_ft("train", document) == (0, "")
