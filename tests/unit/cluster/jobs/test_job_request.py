"""What a run is as a job: the command, its name, what the workers can't see; no cluster is asked."""

from __future__ import annotations

import json
import shlex

import pytest

from dist_ft.cluster.jobs import job_request
from dist_ft.config.load import load_config

BASE = {
    "run": {"name": "mine", "storage": "s3://b/runs"},
    "model": {"path": "org/model"},
    "data": {"train": "s3://b/d/*.jsonl"},
    "batch": {"global_batch": 4, "sequence_length": 64},
    "schedule": {"steps": 3},
    "cluster": {"workers": 2},
}


def make(config, where="package", **changes):
    return job_request.make(
        config,
        where,
        changes.pop("folder"),
        **{"name": "mine", "grace_s": 60, "excludes": [".env"], "variables": {}, **changes},
    )


def test_the_command_holds_the_whole_config_for_the_cluster_around_the_job(tmp_path):
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
        "working_dir": str(tmp_path),
        "excludes": [".env"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"},
    }
    assert request.metadata == {"dist_ft_run": "s3://b/runs/mine", "dist_ft_name": "mine"}


def test_the_printed_line_says_the_same_to_a_shell(tmp_path):
    request = make(load_config(BASE), folder=tmp_path, variables={"A": "b c"})
    words = shlex.split(request.line("http://h:8265", with_token=True))
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
    assert not request.line("http://h:8265", with_token=False).startswith("RAY_AUTH_MODE")


def test_on_this_machine_it_runs_in_the_folder_itself_which_names_the_run(tmp_path):
    folder = tmp_path / "a b"
    request = make(load_config(BASE, ["run.storage=./runs"]), "here", folder=folder)
    assert (
        shlex.split(request.entrypoint)[:2] == ["sh", "-c"]
        and f"cd '{folder}' && exec python" in request.command[2]
    )
    assert "working_dir" not in request.runtime_env
    assert request.metadata["dist_ft_run"] == f"{folder}/runs/mine"


@pytest.mark.parametrize(
    ("taken", "name"),
    [
        ([], "mine"),
        (["other"], "mine"),
        (["mine"], "mine-2"),
        (["mine", "mine-2", "mine-4"], "mine-3"),
    ],
)
def test_each_further_job_of_a_run_has_a_name_of_its_own(taken, name):
    assert job_request.name_for("mine", [{"submission_id": one} for one in taken]) == name


def test_only_a_living_job_of_the_same_run_is_attached_to():
    def job(status, run):
        return {"submission_id": "x", "status": status, "metadata": {"dist_ft_run": run}}

    jobs = [
        job("SUCCEEDED", "s3://b/mine"),
        job("RUNNING", "s3://other/mine"),
        {"submission_id": "y", "status": "RUNNING", "metadata": None},
    ]
    assert job_request.living("s3://b/mine", jobs) is None
    assert (
        job_request.living("s3://b/mine", [*jobs, job("PENDING", "s3://b/mine")])["status"]
        == "PENDING"
    )


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),
        ("FAILED", -9, 137),
        ("STOPPED", None, 130),
    ],
)
def test_exit_codes(status, code, said):
    assert job_request.exit_code({"status": status, "driver_exit_code": code}) == said


def seen(config, where="package", local=False, shared=(), folder=None, excludes=("/runs",)):
    return [
        line.split(":")[0]
        for line in job_request.path_problems(config, where, folder, shared, local, excludes)
    ]


def test_paths_that_workers_do_not_see_are_all_named(tmp_path):
    config = load_config(
        BASE, ["run.storage=./runs", "model.path=/models/m", "data.train=/data/x/*.jsonl"]
    )
    assert seen(config, folder=tmp_path) == [
        "run.storage=./runs",
        "model.path=/models/m",
        "data.train=/data/x/*.jsonl",
    ]
    assert seen(config, folder=tmp_path, shared=["/models", "/data"]) == ["run.storage=./runs"]
    assert seen(config, folder=tmp_path, shared=["/dat"]) != [], (
        "a folder, not the beginning of a name"
    )
    assert seen(config, folder=tmp_path, local=True) == ["run.storage=./runs"], (
        "it would go with the job"
    )
    assert seen(config, "here", local=True, folder=tmp_path) == []
    assert seen(load_config(BASE), folder=tmp_path) == [], (
        "buckets and the hub are seen from everywhere"
    )


def test_relative_paths_are_seen_if_they_are_sent_along(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/a.jsonl").write_text("{}")
    config = load_config(BASE, ["data.train=rows/*.jsonl"])
    assert seen(config, folder=tmp_path) == []
    assert seen(config, "image", folder=tmp_path) == ["data.train=rows/*.jsonl"]
    assert seen(config, folder=tmp_path, excludes=["rows"]) == ["data.train=rows/*.jsonl"]
    assert seen(load_config(BASE, ["data.train=../rows/*.jsonl"]), folder=tmp_path / "rows") == [
        "data.train=../rows/*.jsonl"
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("A", "not of the form"),
        ("=b", "not of the form"),
        ("HF_TOKEN=x", "looks like a credential"),
        ("PROXY=http://u:p@h", "looks like a credential"),
    ],
)
def test_variables_that_are_none_or_secret_are_refused_without_their_value(given, said):
    [line] = job_request.variable_problems(["NCCL_DEBUG=INFO", given])
    assert said in line and "u:p" not in line and "=x" not in line
