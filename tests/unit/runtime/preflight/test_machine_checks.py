"""Folders of this machine that others can write to are found before a run, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config.load import load_config
from dist_ft.config.schema import RunConfig
from dist_ft.runtime.bootstrap.build_model import create_swap_folder
from dist_ft.runtime.preflight.machine_checks import check_folders


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("RAY_ADDRESS", "RANK", "DIST_FT_SHARED_FOLDERS"):
        monkeypatch.delenv(name, raising=False)


def config(tmp_path: Path, **changes: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"run: {{name: r, storage: {tmp_path}/runs}}\nmodel: {{path: {tmp_path}/model}}\n"
        f"data: {{train: {tmp_path}/x.jsonl, cache_dir: {tmp_path}/cache}}\n"
        "batch: {global_batch: 2, micro_batch: 1, sequence_length: 8}\n"
        "optimizer: {learning_rate: 1.0e-3}\nschedule: {steps: 2}\n"
        f"checkpoint: {{local_folder: {tmp_path}/local}}\n"
    )
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return load_config(str(path), overrides)


def lines(tmp_path: Path, **changes: str) -> list[str]:
    return list(check_folders(config(tmp_path, **changes)))


def test_absent_and_private_folders_pass_and_nothing_is_created(tmp_path):
    assert lines(tmp_path) == []
    assert not (tmp_path / "cache").exists() and not (tmp_path / "local").exists()
    (tmp_path / "cache" / "tokens").mkdir(parents=True, mode=0o700)
    (tmp_path / "local").mkdir(mode=0o700)
    assert lines(tmp_path) == []


def test_each_folder_that_others_can_write_to_has_a_line(tmp_path):
    for name in ("local", "cache", "cache/tokens"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    found = lines(tmp_path)
    assert [line.split("=")[0] for line in found] == [
        "data.cache_dir",
        "data.cache_dir",
        "checkpoint.local_folder",
    ]
    assert all("every user of this machine may write to" in line for line in found)


def test_folder_of_swapped_state_is_checked_and_gets_a_private_part(tmp_path):
    nvme = {
        "zero__nvme_path": f"{tmp_path}/nvme",
        "zero__stage": "3",
        "zero__offload_optimizer": "nvme",
        "cluster__workers": "2",
        "cluster__gpus_per_worker": "1",
    }
    assert lines(tmp_path, **nvme) == []
    part = Path(create_swap_folder(config(tmp_path, **nvme)))
    assert part == tmp_path / "nvme/swap-r" and part.stat().st_mode & 0o077 == 0

    (tmp_path / "nvme").chmod(0o777)
    assert [line.split("=")[0] for line in lines(tmp_path, **nvme)] == ["zero.nvme_path"]


def test_folders_of_another_cluster_are_not_checked_here(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert lines(tmp_path, cluster__workers="2")
    assert not lines(tmp_path, cluster__workers="2", cluster__address="10.0.0.1:6379")
