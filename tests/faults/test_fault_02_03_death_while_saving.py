"""Faults 2 and 3: kill -9 at each failpoint of the writer, on two real ranks under ZeRO-2; then
resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import history
import pytest
import ranks
import tiny

FAILPOINTS = {
    "checkpoint.before_file:2@1": 4,  # rank 1 dies before its part of the second checkpoint (step 8)
    "checkpoint.after_file:2": 4,  # both die with their files written, no manifest
    "checkpoint.before_manifest:2": 4,  # rank 0 dies between files and manifest
    "checkpoint.after_manifest:2": 8,  # rank 0 dies right after the commit
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("saving"), samples=70)


@pytest.fixture(scope="module")
def unbroken(base: Path) -> list[float]:
    folder = base / "ranks-unbroken"
    ranks.require_ok(
        ranks.run_ranks(2, [tiny.config(base, "unbroken", workers=2, stage=2)], folder), folder
    )
    return history.losses(base / "runs/unbroken")


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_faults_2_and_3_death_at_a_failpoint_of_the_writer(
    base: Path, unbroken: list[float], failpoint: str
) -> None:
    name = "died-" + "".join(c if c.isalnum() else "-" for c in failpoint).replace(
        "checkpoint-", ""
    )
    name = name.replace("_", "-")
    document = tiny.config(base, name, workers=2, stage=2)
    folder = base / f"ranks-{name}"
    first = ranks.start_ranks(2, [document], folder, {"DIST_FT_FAILPOINT": failpoint})
    codes = ranks.wait_for_death(first)
    assert -9 in codes, (folder / "rank-0.log").read_text()[-2000:]
    resumed = base / f"ranks-{name}-again"
    ranks.require_ok(ranks.run_ranks(2, [document], resumed), resumed)
    log = (resumed / "rank-0.log").read_text()
    assert f"resuming from step {FAILPOINTS[failpoint]}" in log
    assert history.losses(base / "runs" / name) == unbroken
    history.require_exactly_once(base / "runs" / name, document)
    torn = [
        path
        for path in (base / "runs" / name / "checkpoints").iterdir()
        if not (path / "manifest.json").exists()
    ]
    assert torn == [], "torn checkpoints of dead attempts are collected"


def test_fault_17_altered_file_of_a_checkpoint_falls_back_to_the_previous_one(
    base: Path, unbroken: list[float]
) -> None:
    """Truncated and altered files in the latest checkpoint: the previous one is used, and the
    log says why."""
    source = base / "runs/unbroken"
    latest = sorted((source / "checkpoints").iterdir())[-1].name
    previous_step = int(sorted((source / "checkpoints").iterdir())[-2].name.split("-")[1])
    files = sorted(path.name for path in (source / "checkpoints" / latest).iterdir())
    assert len(files) == 3  # two ranks and the manifest
    for number, file in enumerate(files):
        name = f"altered-{number}"
        shutil.copytree(source, base / "runs" / name)
        victim = base / "runs" / name / "checkpoints" / latest / file
        content = bytearray(victim.read_bytes())
        if number == 0:
            content = content[:-7]
        else:
            content[len(content) // 2] ^= 0x10
        victim.write_bytes(bytes(content))
    documents = [
        tiny.config(base, f"altered-{number}", workers=2, stage=2) for number in range(len(files))
    ]
    folder = base / "ranks-altered"
    ranks.require_ok(ranks.run_ranks(2, documents, folder), folder)
    log = (folder / "rank-0.log").read_text()
    assert log.count(f"checkpoint {latest} is skipped:") == len(files)
    assert log.count(f"resuming from step {previous_step}") == len(files)
    for document in documents:
        assert history.losses(base / "runs" / document["run"]["name"]) == unbroken
