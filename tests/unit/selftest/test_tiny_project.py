"""The small project that `dist-ft init --tiny` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError
from dist_ft.runtime.preflight import check_run
from dist_ft.selftest.tiny_project import CAPITALS, write_tiny_project


def test_the_project_passes_every_check(tmp_path: Path) -> None:
    config = load_config(str(write_tiny_project(str(tmp_path / "mine"))))
    assert check_run.check(config, is_complete=True) == []


def test_two_projects_are_equal(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tiny_project(str(tmp_path / name))
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 6
    for path in files:
        if path.name == "run.yaml":
            continue
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes(), path


def test_held_out_questions_are_not_trained_on(tmp_path: Path) -> None:
    write_tiny_project(str(tmp_path))
    prompts = {}
    for name in ("train", "held-out"):
        rows = [
            json.loads(line)
            for path in sorted((tmp_path / "data").glob(f"{name}*"))
            for line in path.read_text().splitlines()
        ]
        prompts[name] = {row["prompt"] for row in rows}
        assert {row["response"] for row in rows} == set(CAPITALS.values())
    assert not prompts["train"] & prompts["held-out"]


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        write_tiny_project(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
