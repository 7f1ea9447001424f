"""A run as a job: its command, its name, the paths that workers cannot see. No cluster is used."""

from __future__ import annotations

import json
import shlex

import pytest

from dist_ft.cluster.jobs import job_request
from dist_ft.cluster.jobs.job_request import Project
from dist_ft.cluster.jobs.package import Package
from dist_ft.config.load import load_config

BASE = {
    "run": {"name": "mine", "storage": "s3://b/runs"},
    "model": {"path": "org/model"},
    "data": {"train": "s3://b/d/*.jsonl"},
    "batch": {"global_batch": 4, "sequence_length": 64},
    "schedule": {"steps": 3},
    "cluster": {"workers": 2},
}


def make(config, location="package", *, folder, **changes):
    return job_request.create_request(
        config,
        Project(location, folder, [".env"], Package(folder / "x.zip", ("a.py",))),
        **{"name": "mine", "grace_s": 60, "variables": {}, **changes},
    )


def test_command_contains_the_whole_config(tmp_path):
    config = load_config(
        BASE,
        ["cluster.address=10.0.0.1:6379", "optimizer.learning_rate=1e-5", "model.path=org/it's"],
    )
    request = make(config, folder=tmp_path)
    *train, document = shlex.split(request.entrypoint)
    assert train == ["python", "-m", "dist_ft.cli", "train"]
    again = load_config(document)
    assert again.cluster.address is None
    assert again.model_copy(update={"cluster": config.cluster}) == config
    assert request.runtime_env == {
        "working_dir": str(tmp_path / "x.zip"),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"},
    }
    assert request.metadata == {"dist_ft_run": "s3://b/runs/mine", "dist_ft_name": "mine"}


def test_printed_command_is_equivalent(tmp_path):
    request = make(load_config(BASE), folder=tmp_path, variables={"A": "b c"})
    words = shlex.split(request.submit_command("http://h:8265", with_token=True))
    assert words[:6] == [
        "RAY_AUTH_MODE=token",
        "ray",
        "job",
        "submit",
        "--address",
        "http://h:8265",
    ]
    assert json.loads(words[words.index("--runtime-env-json") + 1]) == request.runtime_env
    assert tuple(words[words.index("--") + 1 :]) == request.command
    assert not request.submit_command("http://h:8265", with_token=False).startswith("RAY_AUTH_MODE")


def test_job_on_this_machine_runs_in_the_folder_itself(tmp_path):
    folder = tmp_path / "a b"
    request = make(load_config(BASE, ["run.storage=./runs"]), "local", folder=folder)
    assert (
        shlex.split(request.entrypoint)[:2] == ["sh", "-c"]
        and f"cd '{folder}' && exec python" in request.command[2]
    )
    assert "working_dir" not in request.runtime_env
    assert request.metadata["dist_ft_run"] == f"{folder}/runs/mine"


@pytest.mark.parametrize(
    ("used_names", "name"),
    [
        ([], "mine"),
        (["other"], "mine"),
        (["mine"], "mine-2"),
        (["mine", "mine-2", "mine-4"], "mine-3"),
    ],
)
def test_each_job_of_a_run_gets_its_own_name(used_names, name):
    assert job_request.next_job_name("mine", [{"submission_id": one} for one in used_names]) == name


def test_running_job_of_the_same_run_is_found():
    def job(status, run):
        return {"submission_id": "x", "status": status, "metadata": {"dist_ft_run": run}}

    jobs = [
        job("SUCCEEDED", "s3://b/mine"),
        job("RUNNING", "s3://other/mine"),
        {"submission_id": "y", "status": "RUNNING", "metadata": None},
    ]
    assert job_request.find_running_job("s3://b/mine", jobs) is None
    assert (
        job_request.find_running_job("s3://b/mine", [*jobs, job("PENDING", "s3://b/mine")])[
            "status"
        ]
        == "PENDING"
    )


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
        ("STOPPED", None, 130),
    ],
)
def test_exit_codes(status, code, expected):
    assert job_request.exit_code({"status": status, "driver_exit_code": code}) == expected


def unseen_paths(
    config, location="package", local=False, shared=(), folder=None, excludes=("/runs",)
):
    project = Project(location, folder, excludes)
    problems = job_request.find_path_problems(config, project, shared, local)
    return [line.split(":")[0] for line in problems]


def test_paths_that_workers_do_not_see_are_named(tmp_path):
    config = load_config(
        BASE, ["run.storage=./runs", "model.path=/models/m", "data.train=/data/x/*.jsonl"]
    )
    assert unseen_paths(config, folder=tmp_path) == [
        "run.storage=./runs",
        "model.path=/models/m",
        "data.train=/data/x/*.jsonl",
    ]
    assert unseen_paths(config, folder=tmp_path, shared=["/models", "/data"]) == [
        "run.storage=./runs"
    ]
    assert unseen_paths(config, folder=tmp_path, shared=["/dat"]) != [], (
        "a folder, not the start of a name"
    )
    assert unseen_paths(config, folder=tmp_path, local=True) == ["run.storage=./runs"], (
        "it would be deleted with the job"
    )
    assert unseen_paths(config, "local", local=True, folder=tmp_path) == []
    assert unseen_paths(load_config(BASE), folder=tmp_path) == [], (
        "buckets and the hub are visible from everywhere"
    )


def test_relative_paths_are_visible_if_they_are_uploaded(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text("{}")
    config = load_config(BASE, ["data.train=rows/*.jsonl"])
    assert unseen_paths(config, folder=tmp_path) == []
    assert unseen_paths(config, "image", folder=tmp_path) == ["data.train=rows/*.jsonl"]
    assert unseen_paths(config, folder=tmp_path, excludes=["rows"]) == ["data.train=rows/*.jsonl"]
    assert unseen_paths(
        load_config(BASE, ["data.train=../rows/*.jsonl"]), folder=tmp_path / "rows"
    ) == ["data.train=../rows/*.jsonl"]


def test_relative_path_that_is_not_in_the_package_is_named(tmp_path):
    (tmp_path / "rows/deep").mkdir(parents=True)
    (tmp_path / "rows/deep/a.jsonl").write_text("{}")
    config = load_config(BASE, ["data.train=rows/deep/*.jsonl", "model.path=./rows"])

    def problems(*names):
        project = Project("package", tmp_path, (), Package(tmp_path / "x.zip", names))
        return list(job_request.find_path_problems(config, project, (), False))

    assert problems("rows/deep/a.jsonl") == []
    lines = problems("rows-2/a", "rows.md", "deep/a.jsonl")
    assert [line.split("=")[0] for line in lines] == ["model.path", "data.train"]
    assert all("not uploaded with the project: git ignores it" in line for line in lines)


@pytest.mark.parametrize(
    ("assignment", "expected_text"),
    [
        ("A", "not of the form"),
        ("=b", "not of the form"),
        ("HF_TOKEN=x", "looks like a credential"),
        ("PROXY=http://u:p@h", "looks like a credential"),
    ],
)
def test_malformed_or_secret_variables_are_refused_without_their_value(assignment, expected_text):
    [line] = job_request.find_variable_problems(["NCCL_DEBUG=INFO", assignment])
    assert expected_text in line and "u:p" not in line and "=x" not in line
