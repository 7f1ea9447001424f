"""`dist-ft runs` on a real run: its output, damage is found, the latest intact checkpoint stays."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from dist_ft import api
from dist_ft.checkpoint import discovery
from dist_ft.config.load import load_config
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, DataError
from dist_ft.runs import catalog, ledger_audit, report, watch_run
from dist_ft.storage.filesystem import Store

STEPS = [6, 4, 2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    base = tiny.base(tmp_path_factory.mktemp("runs"), 60)
    changes = {
        "schedule": {"epochs": None, "steps": 6},
        "checkpoint": {"every_steps": 2, "keep_last": 9},
    }
    api.train(load_config(tiny.config(base, "mine", **changes)), skip_check=True)
    return base / "runs"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run to damage."""
    return shutil.copytree(trained / "mine", tmp_path / "mine")


def names(run: Path) -> list[str]:
    return discovery.list_committed(Store(str(run)))


def damage(run: Path, name: str) -> None:
    with open(run / "checkpoints" / name / "rank-00000-0000.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))


def test_list_and_show_describe_runs(trained):
    assert "mine" in catalog.describe_all(
        str(trained)
    ) and "step 6, 3 checkpoints, 1 attempt" in catalog.describe_all(str(trained))
    (trained / "mine/attempts/000001-rank-00001-stacks.txt").write_text("Thread ...")
    text = catalog.describe(str(trained / "mine"))
    assert ", world 1; made no progress: 000001-rank-00001-stacks.txt" in text.replace(
        "\n                 ", " "
    )
    assert all(
        f"step-{step:09d}-a0001: 0." in text or f"step-{step:09d}-a0001:" in text for step in STEPS
    )


@pytest.mark.parametrize("content", [None, b"", b'{"attempt": 1', b"[1]", b"null", b"\xff\xfe"])
def test_finding_12_a_damaged_record_hides_no_other_attempt(run, content):
    store = Store(str(run))
    store.write("attempts/000002.json", store.read("attempts/000001.json"))
    store.remove("attempts/000001.json")
    store.write("attempts/000001.json" + ("/file" if content is None else ""), content or b"")
    text = " ".join(catalog.describe(str(run)).split())
    assert "1: its record attempts/000001.json cannot be read (" in text
    assert ", world 1" in text[text.index(" 2: ") :]
    assert "2 attempts" in catalog.describe_all(str(run.parent))
    assert len(report.gather(str(run))["attempts"]) == 2
    assert ledger_audit.audit(str(run)).attempts == 2


def test_fault_26_without_its_attempts_a_run_is_shown(run):
    shutil.rmtree(run / "attempts")
    text = catalog.describe(str(run))
    assert "step-000000006-a0001" in text and "attempt  " not in text
    assert "step 6, 3 checkpoints, 1 attempt" in catalog.describe_all(str(run.parent))


@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"7", b'{"attempt": "x"}'])
def test_a_damaged_time_record_hides_no_other(run, content):
    store = Store(str(run))
    store.remove("time/000001.json")
    store.write("time/000001.json" + ("/file" if content is None else ""), content or b"")
    store.write("time/notes.txt", b"")
    assert "cannot be read" in catalog.describe(str(run))
    assert watch_run.latest_attempt(store).get("ended") is None


def test_a_folder_without_runs_is_an_error(trained, tmp_path):
    with pytest.raises(
        DataError,
        match=r"holds no runs. Give the folder that run.storage names.",
    ):
        catalog.describe_all(str(tmp_path))
    with pytest.raises(DataError, match=r"not a run \(it has no run.yaml\)"):
        catalog.describe(str(tmp_path))


def test_verify_finds_a_flipped_bit(run):
    assert [problem for _, problem in catalog.verify(str(run))] == ["", "", ""]
    damage(run, names(run)[1])
    found = dict(catalog.verify(str(run)))
    assert [bool(problem) for problem in found.values()] == [False, True, False]
    assert found[names(run)[1]].endswith(
        "rank-00000-0000.safetensors: its checksum differs from the manifest's"
    )


def test_prune_lists_first_and_keeps_the_latest_intact_checkpoint(run):
    newest, middle, oldest = names(run)
    assert catalog.prune(str(run), CheckpointSection(keep_last=1), remove=False) == [middle, oldest]
    assert names(run) == [newest, middle, oldest]
    damage(run, newest)
    assert catalog.prune(str(run), CheckpointSection(keep_last=1), remove=True) == [oldest]
    assert names(run) == [newest, middle]


def test_diff_shows_the_change_of_each_weight(run):
    store = Store(str(run))
    text = catalog.diff(str(run), 2, 6)
    first, second = (
        discovery.load_manifest(store, name) for name in (names(run)[2], names(run)[0])
    )
    name = "transformer.wpe.weight"
    before, after = (
        discovery.open_reader(store, m).read(name, "param", 0, int(np.prod(m.tensors[name].shape)))
        for m in (first, second)
    )
    change = np.linalg.norm((after - before).astype(np.float64)) / np.linalg.norm(
        before.astype(np.float64)
    )
    assert any(line.split() == [name, f"{change:.3e}"] for line in text.splitlines())
    with pytest.raises(
        CheckpointError,
        match=r"step 3: .* has no checkpoint of it\. Existing steps: 2, 4, 6\.",
    ):
        catalog.diff(str(run), 2, 3)


def test_the_commands_print_and_exit(run):
    def call(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "dist_ft.cli", "runs", *arguments],
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    code, printed = call("verify", str(run))
    assert code == 0 and printed.splitlines() == [f"{name}: ok" for name in names(run)]
    assert call("prune", str(run))[1].splitlines()[-1] == "2 checkpoints; add --yes to remove"
    damage(run, names(run)[0])
    assert call("verify", str(run))[0] == 1
    assert call("diff", str(run), "--step", "2")[0] == 2
