"""`dist-ft submit` and `jobs` on a real cluster with token authentication: every way a job can end, and its exit code."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import history
import pytest
import tiny
import yaml
from job_cluster import Cluster, CuttableProxy, cluster
from packing_names import HONEST, SECRET

from dist_ft.cluster.jobs import package

pytest.importorskip("aiohttp_cors", reason="needs ray[default] (the extra `cluster`)")
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def there() -> Iterator[Cluster]:
    with cluster() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("submit"))


def write(base: Path, name: str, **changes: dict) -> tuple[str, dict]:
    document = tiny.config(base, name, workers=2, **changes)
    (base / f"{name}.yaml").write_text(yaml.safe_dump(document))
    return f"{name}.yaml", document


def refused(there: Cluster, base: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Submit a run that must not start; return code and what was said, by a person's measure: no traceback."""
    code, output = there.run(
        "submit", write(base, "refused")[0], "--skip-check", *arguments, cwd=base, **env
    )
    assert "Traceback" not in output and there.token not in output
    assert not (base / "runs/refused").exists()
    return code, output


def test_a_job_that_cannot_start_is_one_line_before_anything_starts(
    there: Cluster, base: Path
) -> None:
    code, output = refused(there, base, RAY_AUTH_TOKEN="0" * 64)
    assert (
        code == 1
        and "the token was rejected: it belongs to another cluster" in output
        and "0000" not in output
    )
    code, output = refused(there, base, RAY_AUTH_TOKEN_PATH="", RAY_AUTH_MODE="")
    assert (
        code == 1 and "it requires a token, and none was found. Set RAY_AUTH_TOKEN_PATH" in output
    )
    code, output = refused(there, base, "--address", "http://127.0.0.1:9")
    assert code == 1 and "no job server of Ray answers there (connection refused)" in output
    code, output = refused(there, base, "cluster.workers=5", "cluster.cpus_per_worker=1")
    assert (
        code == 2
        and "5 workers with 1 CPU each are needed, and the cluster (2 nodes, 4 CPU) has room for 4"
        in output
    )
    code, output = refused(there, base, "cluster.gpus_per_worker=1")
    assert code == 2 and "(2 nodes, 4 CPU, 0 GPU) has room for 0" in output
    code, output = refused(there, base, "--package", "run.storage=runs")
    assert (
        code == 2
        and "run.storage=runs: would be stored in the job's own copy of the project" in output
    )
    code, output = refused(there, base, "run.name=Not_For_Kubernetes")
    assert code == 2 and "run.name=Not_For_Kubernetes" in output
    assert "refused" not in there.run("jobs", "list", cwd=base)[1]
    code, output = there.run("jobs", "status", "none", cwd=base)
    assert code == 1 and "none: no such job at" in output and "Traceback" not in output


def shadows_a_module(name: str) -> bool:
    return name.split("/")[0].removesuffix(".py") in sys.stdlib_module_names


@pytest.mark.slow
def test_cluster_has_exactly_the_listed_files(there: Cluster, base: Path, tmp_path: Path) -> None:
    """What the list says, what the archive holds, and what Ray unpacks on a node are the same."""
    project = tmp_path / "project"
    # The job's Python finds modules in the project: a file of another content must not stand for one
    # of the standard library.
    honest = [name for name in HONEST if not shadows_a_module(name)]
    for name in [*SECRET, *honest, "ignored.txt", "deep/er/x.py"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(f"text of {name}\n")
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    (project / ".gitignore").write_text("ignored.txt\n")
    (project / "link.py").symlink_to("train.py")
    (project / "linked").symlink_to("deep")
    (project / "run.sh").write_text("#!/bin/sh\n")
    (project / "run.sh").chmod(0o755)
    file, _ = write(base, "packed", model={"path": str(base / "no-model")})
    shutil.copy(base / file, project / file)
    subprocess.run(["git", "-C", str(project), "add", *honest[:20]], check=True)

    expected = {*honest, ".gitignore", "deep/er/x.py", "link.py", "linked/er/x.py", "run.sh", file}
    assert set(package.files(project)) == expected

    submit = ("submit", file, "--package", "--skip-check")
    code, output = there.run(*submit, "--print", cwd=project)
    assert code == 0, output
    words = shlex.split(output.strip().splitlines()[-2])
    environment = json.loads(words[words.index("--runtime-env-json") + 1])
    printed = Path(environment["working_dir"])
    assert code == 0 and "excludes" not in environment, output
    with zipfile.ZipFile(printed) as archive:
        assert set(archive.namelist()) == expected
    printed.unlink()

    # the job fails for want of a model, after its files were unpacked
    code, output = there.run(*submit, cwd=project)
    assert code == 2 and "no-model" in output, output[-2000:]
    [sent] = {path.parent for path in (there.folder / "ray").rglob("link.py")}
    unpacked = {path.relative_to(sent).as_posix() for path in sent.rglob("*") if path.is_file()}
    assert unpacked == expected
    assert (sent / "link.py").read_text() == "text of train.py\n"
    assert (sent / "run.sh").stat().st_mode & 0o100
    assert list(printed.parent.glob("*.zip")) == [], "the archive on this machine is removed"

    (project / "out.txt").symlink_to("/etc/hosts")
    code, output = there.run(*submit, "run.name=refused", cwd=project)
    assert code == 2 and "out.txt is a link out of the project" in output, output
    assert "refused" not in there.run("jobs", "list", cwd=base)[1]


@pytest.mark.slow
def test_submit_and_the_printed_command_both_finish_the_run(there: Cluster, base: Path) -> None:
    file, document = write(base, "well")
    code, output = there.run("submit", file, "--package", "--exclude", "cache", cwd=base)
    assert code == 0 and "run well: done" in output and "well: SUCCEEDED, exit code 0" in output, (
        output[-3000:]
    )
    history.require_exactly_once(base / "runs/well", document)
    code, line = there.run(
        "submit", file, "run.name=printed", "--package", "--exclude", "cache", "--print", cwd=base
    )
    assert code == 0 and there.token not in line, line
    # the last line, on stderr, says where the archive is
    line = line.strip().splitlines()[-2]
    assert shlex.split(line)[:4] == ["RAY_AUTH_MODE=token", "ray", "job", "submit"]
    done = subprocess.run(
        ["sh", "-c", line], cwd=base, env=there.env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert history.losses(base / "runs/printed") == history.losses(base / "runs/well")


@pytest.mark.slow
def test_a_failed_job_returns_its_own_exit_code(there: Cluster, base: Path) -> None:
    file, _ = write(base, "fails", model={"path": str(base / "no-model")})
    code, output = there.run("submit", file, "--skip-check", cwd=base)
    assert code == 2 and "fails: FAILED, exit code 2" in output and "no-model" in output, output[
        -3000:
    ]
    assert there.run("jobs", "status", "fails", cwd=base)[0] == 2
    code, output = there.run("submit", file, cwd=base)
    assert code == 2 and "model.path=" in output and "is submitted" not in output, (
        "what check finds starts no job"
    )


@pytest.mark.slow
def test_log_stream_cut_ctrl_c_stop_and_resume(there: Cluster, base: Path) -> None:
    file, _ = write(
        base, "long", checkpoint={"every_steps": 0}, schedule={"epochs": None, "steps": 5000}
    )
    proxy = CuttableProxy(int(there.url.rpartition(":")[2]))
    watching = there.start(
        "submit", file, cwd=base, out=base / "first", RAY_API_SERVER_ADDRESS=proxy.url
    )
    for count in (5, 10, 15):
        watching.wait_for(f"step {count:4}/")
        proxy.cut()
    assert proxy.num_cut >= 3
    attached = there.start(
        "submit",
        file,
        "optimizer.learning_rate=1e-4",
        "--skip-check",
        cwd=base,
        out=base / "second",
    )
    attached.wait_for(
        "attached to job long of this run (RUNNING). It was started with another config"
    )
    watching.wait_for(f"step {20:4}/")
    watching.process.send_signal(signal.SIGINT)
    assert watching.process.wait(60) == 130
    assert (
        "the log of job long was interrupted" in watching.stderr
        and "connecting again" in watching.stderr
    )
    assert (
        "job long keeps running. Follow it with dist-ft jobs logs --follow long" in watching.stderr
    )
    assert "Traceback" not in watching.stderr
    code, output = there.run("jobs", "status", "long", cwd=base)
    assert code == 0 and "long: RUNNING" in output
    assert there.run("jobs", "logs", "long", cwd=base)[1].startswith(watching.stdout), (
        "nothing is lost or doubled"
    )
    code, output = there.run("jobs", "stop", "long", cwd=base)
    assert code == 0 and "long: STOPPED" in output, output
    assert attached.process.wait(60) == 130 and "stopped at step" in attached.stdout, (
        attached.stdout[-2000:]
    )
    assert attached.stdout == there.run("jobs", "logs", "long", cwd=base)[1], (
        "the whole log, to its end"
    )
    assert list((base / "runs/long/checkpoints").glob("step-*/manifest.json")), "it has saved"
    again = there.start("submit", file, cwd=base, out=base / "third")
    again.wait_for("job long-2 is submitted")
    again.wait_for("resuming from step")
    code, output = there.run("jobs", "stop", "long-2", cwd=base)
    assert code == 0 and "long-2: STOPPED" in output, output
    assert again.process.wait(60) == 130
    proxy.close()
