"""The command `dist-ft init`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.cli.init import init
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError


def test_init_writes_a_project_and_names_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    init(str(folder), tiny=True)
    assert f"next:    dist-ft train {folder}/run.yaml" in capsys.readouterr().out
    assert load_config(str(folder / "run.yaml")).run.name == "tiny"


def test_without_tiny_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tiny is missing.*configs/single\.yaml"):
        init(str(tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()
