"""The main way to run: real Ray, real workers, real signals. Slow to start, so few tests, each asking much."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import history
import pytest
import tiny
import yaml

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("ray"))


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """Start a Ray cluster that all commands of this module join, and return its address."""
    program = (
        "import ray, sys\nfound = ray.init(address='local', num_cpus=4, include_dashboard=False, "
        "object_store_memory=2**27, log_to_driver=False)\nprint(found.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()\nray.shutdown()"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_ADDRESS", raising=False)
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        patch.setenv("RAY_ADDRESS", next(line.strip() for line in process.stdout if ":" in line))
        yield os.environ["RAY_ADDRESS"]
        process.stdin.close()
        process.wait(60)


def start(
    base: Path, document: dict[str, Any], own: bool = False, **env: str
) -> subprocess.Popen[str]:
    """Start `dist-ft train` on a document, as a person would.

    With `own`, on a Ray of its own: workers of one that is there already see nothing of `env` but failpoints.
    """
    path = base / f"{document['run']['name']}.yaml"
    path.write_text(yaml.safe_dump(document))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **env}
    if own:
        environment.pop("RAY_ADDRESS")
    return subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
        env=environment,
        cwd=base,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str]:
    """Return exit code and output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout_s} s:\n{output[-3000:]}") from None
    return process.returncode, output


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Read output until a line holds `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended with {process.wait()} before it said {text!r}")


@pytest.fixture(scope="module")
def unbroken(base: Path) -> list[float]:
    """The losses of an unbroken run on two Ray workers under ZeRO-3; all its paths are relative."""
    code, output = finish(start(base, tiny.config(Path("."), "unbroken", workers=2)))
    assert code == 0, output[-3000:]
    assert "2 workers" in output and "ZeRO-3" in output
    document = tiny.config(base, "unbroken", workers=2)
    history.require_exactly_once(base / "runs/unbroken", document)
    return history.losses(base / "runs/unbroken")


def test_a_run_on_ray_prints_its_tables_and_is_complete_the_second_time(
    base: Path, unbroken: list[float]
) -> None:
    code, output = finish(
        start(base, tiny.config(Path("."), "unbroken"))
    )  # in one process, which gives the same
    assert code == 0 and f"is complete: step {len(unbroken)} of {len(unbroken)}" in output, output[
        -3000:
    ]
    assert "Traceback" not in output


def test_fault_1_a_worker_killed_mid_run_is_restarted_and_the_run_is_bit_exact(
    base: Path, unbroken: list[float]
) -> None:
    document = tiny.config(base, "worker-died", workers=2)
    code, output = finish(
        start(
            base,
            document,
            own=True,
            DIST_FT_FAILPOINT="train.step:11@1",
            DIST_FT_FAILPOINT_ONCE=str(base / "died-once"),
        )
    )
    assert code == 0, output[-3000:]
    assert (base / "died-once").exists() and "(attempt 2)" in output
    assert history.losses(base / "runs/worker-died") == unbroken
    history.require_exactly_once(base / "runs/worker-died", document)


def test_fault_2_a_worker_killed_mid_save_loses_only_that_save(
    base: Path, unbroken: list[float]
) -> None:
    document = tiny.config(base, "save-died", workers=2)
    code, output = finish(
        start(
            base,
            document,
            DIST_FT_FAILPOINT="checkpoint.after_file:2@0",
            DIST_FT_FAILPOINT_ONCE=str(base / "save-died-once"),
        )
    )
    assert code == 0, output[-3000:]
    assert (base / "save-died-once").exists() and "step 4 of" in output
    assert history.losses(base / "runs/save-died") == unbroken
    history.require_exactly_once(base / "runs/save-died", document)


def test_fault_9_driver_and_head_killed_the_same_command_resumes(
    base: Path, unbroken: list[float]
) -> None:
    document = tiny.config(base, "driver-died", workers=2)
    process = start(base, document, own=True)  # and with it the head of the cluster
    wait_for_line(process, "step 10/")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    code, output = finish(start(base, document))
    assert code == 0, output[-3000:]
    assert "(attempt 2)" in output
    assert "[rank 0] INFO resuming from step" in output, "logs of workers are shown here"
    assert history.losses(base / "runs/driver-died") == unbroken
    history.require_exactly_once(base / "runs/driver-died", document)


def test_fault_7_sigterm_saves_and_the_same_command_resumes(
    base: Path, unbroken: list[float]
) -> None:
    document = tiny.config(base, "stopped", workers=2, checkpoint={"every_steps": 0})
    process = start(base, document)
    wait_for_line(process, "step  5/")
    process.terminate()
    code, output = finish(process)
    assert code == 130 and "stopped at step" in output and "Traceback" not in output, output[-3000:]
    code, output = finish(
        start(base, tiny.config(base, "stopped"))
    )  # resumes in one process, without Ray
    assert code == 0, output[-3000:]
    assert history.losses(base / "runs/stopped") == pytest.approx(unbroken, abs=1e-5)


def test_data_error_ends_the_run_in_one_line_without_restarts(base: Path) -> None:
    bad = base / "bad"
    tiny.make_data(bad, 20)
    (bad / "shard-1.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "no end\n')
    document = tiny.config(base, "bad-data", workers=2, data={"train": f"{bad}/*.jsonl"})
    code, output = finish(start(base, document))
    assert code == 2, output[-3000:]
    assert "shard-1.jsonl row 2" in output and "Traceback" not in output
    assert output.count("shard-1.jsonl row 2") == 1


def test_result_of_ray_names_the_checkpoint_in_storage(base: Path) -> None:
    """From Python, on a cluster that is already there: Ray knows the checkpoint, an elastic range takes what there is."""
    script = base / "script.py"
    script.write_text(SCRIPT)
    document = tiny.config(
        base,
        "python",
        workers=2,
        zero={"stage": 1},
        schedule={"epochs": None, "steps": 3},
        cluster={"workers": [1, 2], "cpus_per_worker": 1},
    )
    (base / "python.json").write_text(json.dumps(document))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), str(base / "python.json")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "RAY_ADDRESS": ""},
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["busy"].startswith(
        "cluster.start_timeout_s=3: no worker started within that time; 2 workers are needed"
    )
    assert seen["checkpoint"] == seen["result"] and seen["checkpoint"].endswith(
        "step-000000003-a0001"
    )
    assert time.monotonic() - began < 300


SCRIPT = """
import json, sys
import ray
from dist_ft.config.load import load_config
from dist_ft.core.errors import WorkerError
from dist_ft.runtime.ray_backend import driver as ray_train

class Holder:
    def hold(self):
        pass

def main():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="dist_ft")
    document = json.load(open(sys.argv[1]))
    config = load_config(document)
    holder = ray.remote(num_cpus=1)(Holder).remote()
    ray.get(holder.hold.remote())
    try:
        ray_train.run(load_config(document, ["run.name=busy", "cluster.workers=2", "cluster.start_timeout_s=3"]))
    except WorkerError as error:
        busy = str(error)
    del holder
    results = []
    fit = ray_train.create_trainer
    def keep(*args):
        trainer = fit(*args)
        inner = trainer.fit
        trainer.fit = lambda: results.append(inner())
        return trainer
    ray_train.create_trainer = keep
    result = ray_train.run(config)
    print()
    print(json.dumps({"busy": busy, "checkpoint": results[0].checkpoint.path, "result": result.checkpoint}))

main()
"""


def test_fault_24_without_the_clusters_token_nothing_runs(base: Path) -> None:
    code, output = finish(
        start(base, tiny.config(base, "no-token", workers=2), RAY_AUTH_TOKEN="0" * 64)
    )
    assert code == 1 and not (base / "runs/no-token").exists()
    last = [line for line in output.splitlines() if line.startswith("dist-ft: ")]
    assert len(last) == 1 and "cannot connect to Ray" in last[0], output[-3000:]
    assert os.environ["RAY_AUTH_TOKEN"] not in output and "Traceback" not in output


def test_a_run_on_ray_with_an_object_store_ends_in_its_first_attempt(base: Path) -> None:
    """Ray accepts a checkpoint only if it takes its filesystem for the run's; else it would restart a run that is done."""
    pytest.importorskip("moto.server", reason="needs moto[server] (the extra `dev`)")
    import s3

    with s3.server() as port:
        document = tiny.config(
            base,
            "stored",
            workers=2,
            schedule={"epochs": None, "steps": 4},
            checkpoint={"every_steps": 2},
            storage={"options": {"s3": {"endpoint_url": f"http://127.0.0.1:{port}"}}},
        )
        document["run"]["storage"] = f"s3://{s3.BUCKET}/runs"
        code, output = finish(start(base, document, own=True, **s3.CREDENTIALS))
    assert code == 0 and "run stored: done" in output and "is complete" not in output, output[
        -3000:
    ]


OTHER = """
import sys
import ray
ray.init(address="local", num_cpus=1, include_dashboard=True, object_store_memory=2**27, log_to_driver=False)
print("up", flush=True)
sys.stdin.read()
ray.shutdown()
"""


def test_another_ray_on_this_machine_does_not_end_a_run(base: Path) -> None:
    """Ray Train's own watch queries any Ray on the machine, which may not know this run."""
    pytest.importorskip("aiohttp_cors", reason="needs ray[default] (the extra `cluster`)")
    bare = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=bare,
    )
    try:
        wait_for_line(other, "up")
        document = tiny.config(
            base,
            "next-to-it",
            workers=2,
            schedule={"epochs": None, "steps": 150},
            checkpoint={"every_steps": 0},
        )
        path = base / "next-to-it.yaml"
        path.write_text(yaml.safe_dump(document))
        code, output = finish(
            subprocess.Popen(
                [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
                cwd=base,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**bare, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            )
        )
    finally:
        assert other.stdin is not None
        other.stdin.close()
        other.wait(60)
    assert code == 0 and "run next-to-it: done" in output, output[-3000:]
