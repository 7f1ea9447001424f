"""What a run is as a job of Ray: command, runtime environment, metadata and name. Decides only; asks no cluster.

Guarantees: what was checked is what runs, because the command holds the whole config; a run's job is named after it, so
that a second one of the same run is noticed; no credential is in any of it. Says which paths workers can't see.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dist_ft.cluster.jobs.package import is_excluded
from dist_ft.config.load import load_config, to_mapping
from dist_ft.config.schema import RunConfig
from dist_ft.core.logs import SECRET_NAME
from dist_ft.storage import filesystem

Where = Literal["package", "here", "image"]
"""The job finds the project in what was sent along; in this folder itself (a cluster of this machine); in its image."""
RUN, NAME = "dist_ft_run", "dist_ft_name"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED_CODE = 130
"""The exit code of a run that was asked to stop, here and there."""
_HUB = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Request:
    """A job to be.

    Attributes:
        name: submission id.
        command: argv of the entry point.
        runtime_env, metadata: as Ray takes them.
    """

    name: str
    command: tuple[str, ...]
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    @property
    def entrypoint(self) -> str:
        """The shell command."""
        return shlex.join(self.command)

    def line(self, url: str, with_token: bool) -> str:
        """Return the `ray job submit` line that does the same."""
        words = [
            "ray",
            "job",
            "submit",
            "--address",
            url,
            "--submission-id",
            self.name,
            "--runtime-env-json",
            json.dumps(self.runtime_env),
            "--metadata-json",
            json.dumps(self.metadata),
            "--",
            *self.command,
        ]
        return ("RAY_AUTH_MODE=token " if with_token else "") + shlex.join(words)


def make(
    config: RunConfig,
    where: Where,
    folder: Path,
    *,
    name: str,
    grace_s: int,
    excludes: Sequence[str],
    variables: Mapping[str, str],
    skip_check: bool = False,
) -> Request:
    """Return the job of a run.

    Args:
        config: the run.
        where: the job finds the project.
        folder: the project's.
        name: submission id.
        grace_s: seconds a stop may take before the job's processes are killed.
        excludes: what is not packed.
        variables: environment variables of the job and its workers.
        skip_check: whether the job, too, begins without the probes of `check`.
    """
    train = (
        "python",
        "-m",
        "dist_ft.cli",
        "train",
        *(["--skip-check"] if skip_check else []),
        inline(config),
    )
    command = (
        ("sh", "-c", f"cd {shlex.quote(str(folder))} && exec {shlex.join(train)}")
        if where == "here"
        else train
    )
    environment: dict[str, Any] = {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s), **variables}
    }
    if where == "package":
        environment |= {"working_dir": str(folder), "excludes": list(excludes)}
    return Request(name, command, environment, {RUN: place(config, folder), NAME: config.run.name})


def inline(config: RunConfig) -> str:
    """Return the config as a text that `load_config` takes, for the cluster around the job. Pure."""
    document = config.model_dump(mode="json", exclude_defaults=True)  # short: people read it
    if load_config(document) != config:
        document = to_mapping(config)
    document.get("cluster", {}).pop("address", None)
    return json.dumps(document, ensure_ascii=False)


def place(config: RunConfig, folder: Path) -> str:
    """Return the URL of the run's folder, a relative one counted from the project's. Pure."""
    url = config.run_url
    return str(folder / filesystem.local_path(url)) if filesystem.is_local(url) else url


def name_for(run: str, jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return the submission id of the next job of a run: its name, then name-2, name-3, ... Pure."""
    taken = {job["submission_id"] for job in jobs}
    return next(
        name
        for number in range(1, len(taken) + 2)
        if (name := run if number == 1 else f"{run}-{number}") not in taken
    )


def living(run: str, jobs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the job of the run at `run` (`place`) that has not ended, if there is one. Pure."""
    return next(
        (
            job
            for job in jobs
            if (job.get("metadata") or {}).get(RUN) == run and job["status"] not in ENDED
        ),
        None,
    )


def exit_code(job: Mapping[str, Any]) -> int:
    """Return the exit code that says how a job ended. Pure."""
    if job["status"] == "STOPPED":
        return STOPPED_CODE
    code = job.get("driver_exit_code")
    if job["status"] == "SUCCEEDED":
        return 0
    return 1 if not code else code if code > 0 else 128 - code


def variable_problems(given: Sequence[str]) -> Iterator[str]:
    """Yield a line for each `--env` that is none, or is a credential: a cluster shows them to all its users. Pure."""
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"--env: {name}: not of the form NAME=VALUE; write for instance --env NCCL_DEBUG=INFO"
        elif SECRET_NAME.search(name) or ("://" in value and "@" in value):
            yield (
                f"--env {name}: looks like a credential, and Ray shows a job's environment to all who use the "
                "cluster; others are allowed; give it to the nodes (a service account, a Kubernetes secret)"
            )


def path_problems(
    config: RunConfig,
    where: Where,
    folder: Path,
    shared: Sequence[str],
    local: bool,
    excludes: Sequence[str],
) -> Iterator[str]:
    """Yield a line for each path of the run that its workers can't see.

    Args:
        config: the run.
        where: the job finds the project.
        folder: the project's; relative paths begin here.
        shared: folders that all nodes see under the same path.
        local: whether all nodes are this machine.
        excludes: what is not packed.
    """
    if where == "here":
        return
    for field, value, is_output in _paths(config):
        if not filesystem.is_local(value):
            continue
        path = Path(filesystem.local_path(value)).expanduser()
        if path.is_absolute():
            if not local and not any(path.is_relative_to(seen) for seen in shared):
                yield (
                    f"{field}={value}: a path of this machine, which the cluster's workers do not see; a bucket "
                    "(s3://...) or a folder all nodes share is needed; copy it there, or name the shared folder: "
                    f"--shared {path.anchor}{'/'.join(path.parts[1:2])}"
                )
        elif is_output:
            yield (
                f"{field}={value}: would lie in the job's own copy of the project, which goes with the job; a "
                "bucket (s3://...) or the absolute path of a folder all nodes share is needed"
            )
        elif where == "image" or is_excluded(value, excludes):
            yield (
                f"{field}={value}: a relative path, which is not sent along; a bucket or an absolute path that all "
                "nodes see is needed"
                + ("; or send the project: --package" if where == "image" else "")
            )
        elif not is_output and not _is_in(folder, value):
            yield f"{field}={value}: not in the project's folder {folder}, which is sent along; check it"


def _is_in(folder: Path, value: str) -> bool:
    pattern = os.path.normpath(value)
    return not pattern.startswith("..") and any(True for _ in folder.glob(pattern))


def _paths(config: RunConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield (field, value, whether the run writes there) of all that may be a path."""
    yield "run.storage", config.run.storage, True
    for field, value in (
        ("model.path", config.model.path),
        ("model.tokenizer", config.model.tokenizer),
    ):
        if value is not None and not (_HUB.match(value) and not os.path.exists(value)):
            yield field, value, False
    for field, sources in (
        ("data.train", config.data.train),
        ("evaluation.data", config.evaluation.data),
        ("tuning.anchor.data", config.tuning.anchor.data),
    ):
        for source in sources or ():
            if not _HUB.match(source.path) or os.path.exists(source.path):
                yield field, source.path, False
    for field, value in (
        ("model.chat_template", config.model.chat_template),
        ("data.augment.synonyms", config.data.augment.synonyms),
    ):
        if value is not None:
            yield field, value, False
