"""Secrets of the environment that code and libraries put into errors are in no output and no file."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import tiny
import yaml

SECRET = 's3cr3t "quoted\\ value/1977'
VARIABLES = {"STORE_PASSWORD": SECRET, "GITHUB_PAT": "pat-1977-x7f", "PGPASS": "pg7-x1"}

# A library's error, as HTTP clients and drivers write them.
SCRIPT = """
import json, logging, os, sys
from base64 import b64encode
from urllib.parse import quote
from dist_ft import Callback, load_config, train

class Leaky(Callback):
    def on_step_end(self, step, loss):
        secret, pat = os.environ["STORE_PASSWORD"], os.environ["GITHUB_PAT"]
        basic = b64encode(f"user:{secret}".encode()).decode()
        logging.getLogger("dist_ft.mine").warning("header %r", {"Authorization": f"Basic {basic}"})
        logging.getLogger("dist_ft.mine").warning("body %s", json.dumps({"x": secret}))
        logging.getLogger("dist_ft.mine").warning("PGPASS is %s", os.environ["PGPASS"])
        if step == 2:
            raise ValueError(f"GET https://u:{quote(secret, safe='')}@host?token={pat}: {secret!r}")

try:
    train(load_config(sys.argv[1]), callbacks=[Leaky()], skip_check=True)
except Exception as error:
    print("ENDED", type(error).__name__, error)
"""


def spellings(secret: str) -> list[str]:
    percent = quote(secret, safe="")
    return [
        secret,
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        percent,
        percent.lower(),
        base64.b64encode(f"user:{secret}".encode()).decode().rstrip("="),
        secret.encode().hex(),
    ]


def found_in(text: str) -> list[str]:
    return [name for name, value in VARIABLES.items() for one in spellings(value) if one in text]


@pytest.fixture(scope="module")
def failed_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder of a run whose callback failed with secrets in its error, and the output."""
    base = tiny.base(tmp_path_factory.mktemp("leaky"), samples=24)
    document = tiny.config(
        base,
        "leaky",
        schedule={"epochs": None, "steps": 4},
        checkpoint={"every_steps": 1, "background": False},
        log={"tensorboard": True},
    )
    file = base / "leaky.yaml"
    file.write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **VARIABLES, "OMP_NUM_THREADS": "1"},
    )
    return base, done.stdout + done.stderr


def dist_ft(*arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **VARIABLES, "OMP_NUM_THREADS": "1", **variables},
    )
    return done.stdout + done.stderr


def test_logs_and_errors_of_a_failing_run(failed_run: tuple[Path, str]) -> None:
    _, output = failed_run
    assert "ENDED CallbackError" in output, output[-2000:]
    assert output.count("<PGPASS>") == 2 and "<STORE_PASSWORD>" in output
    assert not found_in(output)


def test_files_of_a_failing_run(failed_run: tuple[Path, str]) -> None:
    base, _ = failed_run
    files = [path for path in (base / "runs").rglob("*") if path.is_file()]
    assert any(path.name == "run.yaml" for path in files)
    for path in files:
        assert not found_in(path.read_bytes().decode("latin-1")), path


def test_reports_show_no_secret_that_is_stored(
    failed_run: tuple[Path, str], tmp_path: Path
) -> None:
    """An older version may have stored one, and a user may have secrets in a run's name or path."""
    base, _ = failed_run
    stored = base / "runs/leaky/run.yaml"
    text = stored.read_text()
    secret = VARIABLES["GITHUB_PAT"]
    document = yaml.safe_load(text)
    document["storage"]["options"] = {"s3": {"x": f'{secret} "quoted"', "url": "https://u:p7x@h"}}
    stored.write_text(yaml.safe_dump(document))
    try:
        output = dist_ft("runs", "report", str(base / "runs/leaky"), "--out", str(tmp_path))
        output += dist_ft("runs", "show", str(base / "runs/leaky"))
        output += dist_ft("export", str(base / "runs/leaky"), "--out", str(tmp_path / "model"))
    finally:
        stored.write_text(text)

    assert "wrote report.html" in output, output
    json.loads((tmp_path / "report.json").read_text())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "README.md" for path in files), output
    for path in files:
        content = path.read_bytes().decode("latin-1")
        assert secret not in content and "u:p7x" not in content, path


def test_debug_output_and_the_saved_traceback(tmp_path: Path) -> None:
    """Storage that does not answer: its address is in the errors of several libraries."""
    config = tmp_path / "run.yaml"
    document = tiny.config(tiny.base(tmp_path), "x")
    document["model"]["path"] = "http://127.0.0.1:9/m"
    config.write_text(yaml.safe_dump(document))
    secret = VARIABLES["GITHUB_PAT"]
    output = dist_ft(
        "check",
        str(config),
        DIST_FT_DEBUG="1",
        HTTP_PROXY=f"http://u:{secret}@127.0.0.1:9",
        http_proxy=f"http://u:{secret}@127.0.0.1:9",
    )
    assert "http://127.0.0.1:9/m/" in output and secret not in output
