"""A run as a Ray job: command, runtime environment, metadata and name.

Decides only; does not contact a cluster. Guarantees: the config that was checked is the one that
runs, because the command contains all of it; a run's job is named after the run, so that a second
job of the same run is noticed; nothing of it contains a credential. It also finds the paths that
workers cannot see.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dist_ft.cluster.jobs.job_server import JobInfo
from dist_ft.cluster.jobs.package import Package, is_excluded
from dist_ft.config.credentials import find_credential, require_no_credentials
from dist_ft.config.load import load_config, to_mapping
from dist_ft.config.schema import RunConfig
from dist_ft.core.secret_names import is_secret_variable
from dist_ft.storage import filesystem

ProjectLocation = Literal["package", "local", "image"]
"""Where the job finds the project: uploaded with the job; in the folder itself (a cluster on
this machine); in the image."""
RUN_KEY, NAME_KEY = "dist_ft_run", "dist_ft_name"
"""Keys of a job's metadata."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED_CODE = 130
"""Exit code of a stopped run, as a job and locally."""
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Project:
    """The project that a job uses.

    Attributes:
        location: where the job finds it.
        folder: the project's folder on this machine.
        excludes: patterns of files that are not uploaded.
        package: its files, packed for upload; None: they are not uploaded, or could not be packed.
    """

    location: ProjectLocation
    folder: Path
    excludes: Sequence[str] = ()
    package: Package | None = None


@dataclass(frozen=True)
class Request:
    """A job to submit.

    Attributes:
        name: submission id.
        command: argv of the entry point.
        runtime_env: runtime environment in Ray's form.
        metadata: metadata in Ray's form.
    """

    name: str
    command: tuple[str, ...]
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    @property
    def entrypoint(self) -> str:
        """The shell command."""
        return shlex.join(self.command)

    def submit_command(self, url: str, with_token: bool) -> str:
        """Return the equivalent `ray job submit` command."""
        words = [
            *("ray", "job", "submit", "--address", url),
            *("--submission-id", self.name),
            *("--runtime-env-json", json.dumps(self.runtime_env)),
            *("--metadata-json", json.dumps(self.metadata)),
            "--",
            *self.command,
        ]

        # The token itself is not printed: Ray reads it where `ray_token.find_token` does.
        prefix = "RAY_AUTH_MODE=token " if with_token else ""
        return prefix + shlex.join(words)


def create_request(
    config: RunConfig,
    project: Project,
    *,
    name: str,
    grace_s: int,
    variables: Mapping[str, str],
    skip_check: bool = False,
) -> Request:
    """Return the job of a run.

    Args:
        config: the run.
        project: where the job finds the project.
        name: submission id.
        grace_s: seconds that a stop may take before the job's processes are killed.
        variables: environment variables of the job and its workers.
        skip_check: whether the job, too, starts without the probes of `check`.
    """
    options = ["--skip-check"] if skip_check else []
    command = ("python", "-m", "dist_ft.cli", "train", *options, inline_config(config))

    # `exec`, so that Ray's stop signal reaches the run and not the shell in front of it
    if project.location == "local":
        folder = shlex.quote(str(project.folder))
        command = ("sh", "-c", f"cd {folder} && exec {shlex.join(command)}")

    environment: dict[str, Any] = {
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s), **variables}
    }

    # The archive, never the folder: Ray would pack the folder by rules of its own.
    if project.location == "package":
        assert project.package is not None
        environment["working_dir"] = str(project.package.archive)

    metadata = {RUN_KEY: run_location(config, project.folder), NAME_KEY: config.run.name}
    return Request(name, command, environment, metadata)


def inline_config(config: RunConfig) -> str:
    """Return the config as JSON that `load_config` accepts, without the cluster's address.

    Raises:
        ConfigError: it holds a credential, which the command would show to all of the cluster.
    """
    require_no_credentials(config, f"submit {config.run.name}")

    # A field that differs from its default only because another field is set is left out, and then
    # the short form gives another config.
    document = config.model_dump(mode="json", exclude_defaults=True)  # short: people read it
    if load_config(document) != config:
        document = to_mapping(config)

    # The job runs inside the cluster, where the address from here may not exist.
    document.get("cluster", {}).pop("address", None)
    return json.dumps(document, ensure_ascii=False)


def run_location(config: RunConfig, folder: Path) -> str:
    """Return the URL of the run's folder; a relative one is relative to the project's `folder`."""
    url = config.run_url
    if filesystem.is_local(url):
        return str(folder / filesystem.local_path(url))
    return url


def next_job_name(run: str, jobs: Sequence[JobInfo]) -> str:
    """Return the submission id of the run's next job: the run's name, then name-2, name-3, ..."""
    # Ray keeps ended jobs and refuses their ids, so a run that resumes needs another one.
    used = {job["submission_id"] for job in jobs}

    name = run
    number = 1
    while name in used:
        number += 1
        name = f"{run}-{number}"
    return name


def find_running_job(run: str, jobs: Sequence[JobInfo]) -> JobInfo | None:
    """Return the job of the run at `run` (`run_location`) that has not ended, or None."""
    # not by the name of the run: runs in other storages may have the same one
    for job in jobs:
        metadata = job.get("metadata") or {}
        if metadata.get(RUN_KEY) == run and job["status"] not in ENDED:
            return job
    return None


def exit_code(job: JobInfo) -> int:
    """Return the exit code of a job that has ended."""
    if job["status"] == "STOPPED":
        return STOPPED_CODE
    if job["status"] == "SUCCEEDED":
        return 0

    # a job whose command never started has no code
    code = job.get("driver_exit_code")
    if not code:
        return 1
    if code < 0:
        return 128 - code  # killed by a signal: the code that a shell reports
    return code


def find_variable_problems(assignments: Sequence[str]) -> Iterator[str]:
    """Yield a line for each malformed or secret `--env`: a cluster shows them to all users."""
    for number, text in enumerate(assignments, 1):
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            # Not quoted: a text without a name may be the value.
            yield (
                f"--env: number {number} is not of the form NAME=VALUE. Write for example --env "
                "NCCL_DEBUG=INFO."
            )
        # A harmless name may carry a URL with a password, or a key of a service.
        elif is_secret_variable(name) or find_credential(name, value):
            yield (
                f"--env {name}: looks like a credential, and Ray shows a job's environment to all "
                "users of the cluster. Give it to the nodes instead (a service account, a "
                "Kubernetes secret)."
            )


def find_path_problems(
    config: RunConfig, project: Project, shared: Sequence[str], is_local_cluster: bool
) -> Iterator[str]:
    """Yield a line for each path of the run that its workers cannot see.

    Args:
        config: the run.
        project: where the job finds the project; relative paths start at its folder.
        shared: folders that all nodes see under the same path.
        is_local_cluster: whether all nodes are this machine.
    """
    # the job runs in the project's folder of this machine and sees what the user sees
    if project.location == "local":
        return

    for path in _config_paths(config):
        if not filesystem.is_local(path.value):
            continue

        local_path = Path(filesystem.local_path(path.value)).expanduser()
        if not local_path.is_absolute():
            problem = _relative_path_problem(path, project)
        elif is_local_cluster or any(local_path.is_relative_to(folder) for folder in shared):
            problem = None
        else:
            # suggest the top folder, where shares are usually mounted
            problem = (
                "a path of this machine, which the cluster's workers do not see. Copy it to a "
                "bucket (s3://...) or a folder that all nodes share, or name the shared "
                f"folder: --shared {local_path.anchor}{'/'.join(local_path.parts[1:2])}"
            )
        if problem:
            yield f"{path.field}={path.value}: {problem}"


class _ConfigPath(NamedTuple):
    """A config value that may be a path; `is_output`: the run writes there."""

    field: str
    value: str
    is_output: bool = False


def _relative_path_problem(path: _ConfigPath, project: Project) -> str | None:
    if path.is_output:
        return (
            "would be stored in the job's own copy of the project, which is deleted with the job. "
            "Use a bucket (s3://...) or the absolute path of a folder that all nodes share."
        )

    if project.location == "image" or is_excluded(path.value, project.excludes):
        remedy = " Or upload the project: --package" if project.location == "image" else ""
        return (
            "a relative path, which is not uploaded. Use a bucket or an absolute path that all "
            f"nodes see.{remedy}"
        )

    # Paths may be globs. What lies above the folder is not uploaded.
    pattern = os.path.normpath(path.value)
    found = [] if pattern.startswith("..") else list(project.folder.glob(pattern))
    if not found:
        return f"not in the project's folder {project.folder}, which is uploaded. Correct the path."

    if project.package is not None and not _holds_any(project.package, project.folder, found):
        return (
            "not uploaded with the project: git ignores it, or it is excluded. Change .gitignore, "
            "or use a bucket or an absolute path that all nodes see."
        )
    return None


def _holds_any(package: Package, folder: Path, paths: Sequence[Path]) -> bool:
    """Return whether a package holds one of the files, or a file below one of the folders."""
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if any(packed == name or packed.startswith(f"{name}/") for packed in package.names):
            return True
    return False


def _config_paths(config: RunConfig) -> Iterator[_ConfigPath]:
    """Yield all values of the config that may be paths."""
    yield _ConfigPath("run.storage", config.run.storage, is_output=True)

    # a name on the hub is downloaded by the workers, so it is no path
    for field, name in (
        ("model.path", config.model.path),
        ("model.tokenizer", config.model.tokenizer),
    ):
        if name is not None and not _is_hub_name(name):
            yield _ConfigPath(field, name)

    for field, sources in (
        ("data.train", config.data.train),
        ("evaluation.data", config.evaluation.data),
        ("tuning.anchor.data", config.tuning.anchor.data),
    ):
        for source in sources or ():
            if not _is_hub_name(source.path):
                yield _ConfigPath(field, source.path)

    for field, value in (
        ("model.chat_template", config.model.chat_template),
        ("data.augment.synonyms", config.data.augment.synonyms),
    ):
        if value is not None:
            yield _ConfigPath(field, value)


def _is_hub_name(value: str) -> bool:
    # "org/model" may also be a folder here; then the local one is meant
    is_path = value.startswith((".", "~")) or os.path.exists(value)
    return bool(_HUB_NAME.match(value)) and not is_path
