"""Notifications of real runs: a real command and a real HTTP server, in one process and on Ray."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import history
import pytest
import tiny
import webhook
import yaml

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("notify"), samples=40)


def document(base: Path, name: str, workers: int = 0, **notify: Any) -> dict[str, Any]:
    """Return a run whose command writes each notice to NAME-notices/."""
    folder = base / f"{name}-notices"
    folder.mkdir()
    script = base / f"{name}.sh"
    script.write_text(f'#!/bin/sh\ncat > "{folder}/$DIST_FT_EVENT-$$.json"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return tiny.config(
        base,
        name,
        workers=workers,
        schedule={"epochs": None, "steps": 8},
        log={"notify": {"command": [str(script)], "webhook_env": "MY_HOOK", **notify}},
    )


def train(
    base: Path, config: dict[str, Any], url: str, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `dist-ft train`."""
    path = base / f"{config['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
        env={
            **environment,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "MY_HOOK": url,
            **env,
        },
        cwd=base,
        capture_output=True,
        text=True,
        timeout=300,
    )


def from_command(base: Path, name: str) -> list[dict[str, Any]]:
    """Return the notices that the command got, by their time."""
    paths = sorted((base / f"{name}-notices").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in paths]


def require_secret(base: Path, name: str, output: str) -> None:
    """Fail if the URL of the webhook is in the output or in a file of the run."""
    assert "s3cretPath" not in output
    for path in (base / "runs" / name).rglob("*"):
        if path.is_file():
            assert b"s3cretPath" not in path.read_bytes(), path


def test_end_of_a_run_reaches_the_command_and_the_webhook(base: Path) -> None:
    config = document(base, "complete")
    with webhook.serve(500, 200) as server:
        ended = train(base, config, server.url)
        assert ended.returncode == 0, ended.stderr[-3000:]
        first, second = server.requests
    (notice,) = from_command(base, "complete")
    assert (notice["event"], notice["run"], notice["step"]) == ("end", "complete", 8)
    assert notice["storage"] == str(base / "runs/complete")
    assert notice["message"].startswith("complete: step 8 of 8, loss ")
    assert first == second == {"text": f"dist_ft run complete: {notice['message']}", **notice}
    require_secret(base, "complete", ended.stdout + ended.stderr)
    stored = yaml.safe_load((base / "runs/complete/run.yaml").read_text())
    assert stored["log"]["notify"]["webhook_env"] == "MY_HOOK"


@pytest.mark.slow
def test_giving_up_is_reported_and_a_hanging_server_does_not_hold_up_the_end(base: Path) -> None:
    config = document(base, "failed", timeout_s=2)
    with webhook.serve(0) as server:
        start_s = time.monotonic()
        ended = train(base, config, server.url, DIST_FT_FAILPOINT="train.step:3!storage")
        took_s = time.monotonic() - start_s
        assert ended.returncode == 1 and took_s < 60, ended.stderr[-3000:]
        assert len(server.requests) == 3, "tries are bounded"
    (notice,) = from_command(base, "failed")
    assert (notice["event"], notice["step"]) == ("give_up", 2)
    assert notice["message"] == "failpoint: storage fails"
    lines = [line for line in ended.stderr.splitlines() if "notice" in line]
    assert lines == [
        "WARNING log.notify.webhook_env=MY_HOOK: a notice was not delivered (give_up): no answer "
        "within 2 s"
    ]
    assert ended.stderr.splitlines()[-1] == "dist-ft: failpoint: storage fails"
    require_secret(base, "failed", ended.stdout + ended.stderr)


@pytest.mark.slow
def test_redirects_are_not_followed_and_the_losses_are_those_without_notices(base: Path) -> None:
    config = document(base, "redirected")
    with webhook.serve(200) as other, webhook.serve(302, location=other.url) as server:
        ended = train(base, config, server.url)
        assert ended.returncode == 0 and other.paths == [] and len(server.paths) == 1
    assert "answered 302; redirects are not followed" in ended.stderr
    plain = {**config, "run": {**config["run"], "name": "plain"}, "log": {"tensorboard": False}}
    assert train(base, plain, "").returncode == 0
    assert history.losses(base / "runs/redirected") == history.losses(base / "runs/plain")


@pytest.mark.slow
def test_hang_of_a_single_process_is_reported_before_the_watchdog_ends_it(base: Path) -> None:
    config = document(base, "hung", no_progress_s=2)
    config["cluster"]["progress_timeout_s"] = 6
    with webhook.serve(200) as server:
        ended = train(base, config, server.url, DIST_FT_FAILPOINT="train.step:3!sleep")
        assert ended.returncode == 75, ended.stderr[-3000:]
        # On a busy machine the start is a standstill too.
        events = [request["event"] for request in server.requests]
        assert events[-2:] == ["no_progress", "give_up"] and events.count("give_up") == 1
    standstill, end = from_command(base, "hung")[-2:]
    assert standstill["message"] == "no progress for 2 s; the last step was 2"
    assert end["event"] == "give_up" and "cluster.progress_timeout_s=6" in end["message"]


@pytest.mark.slow
def test_stop_on_request_is_an_end(base: Path) -> None:
    config = document(base, "stopped")
    config["schedule"]["steps"] = 100_000
    path = base / "stopped.yaml"
    path.write_text(yaml.safe_dump(config))
    with webhook.serve(200) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MY_HOOK": server.url},
            cwd=base,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step"):
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert process.returncode == 130
        (request,) = server.requests
    assert request["event"] == "end" and "as requested; saved as" in request["message"]


@pytest.mark.slow
@pytest.mark.ray
def test_restarts_and_standstill_on_ray_are_reported_by_the_driver(base: Path) -> None:
    config = document(base, "on-ray", workers=2, restarts=2, no_progress_s=5)
    config["checkpoint"]["every_steps"] = 2
    config["schedule"]["steps"] = 16
    failpoints = "train.step:3@1;train.step:4@0;train.step:5@1!sleep12"
    with webhook.serve(200) as server:
        ended = train(
            base,
            config,
            server.url,
            DIST_FT_FAILPOINT=failpoints,
            DIST_FT_FAILPOINT_ONCE=str(base / "on-ray-once"),
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
        events = [request["event"] for request in server.requests]
        texts = [request["text"] for request in server.requests]
    assert events.count("restarts") == 1 and events[-1] == "end"
    assert any("no progress for " in text and "the last step was " in text for text in texts)
    notices = {notice["event"]: notice for notice in from_command(base, "on-ray")}
    assert notices["restarts"]["message"].startswith(
        "2 restarts within 1:00:00; the latest: worker "
    )
    assert notices["end"]["step"] == 16
    require_secret(base, "on-ray", ended.stdout + ended.stderr)
