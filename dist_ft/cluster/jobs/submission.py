"""Submits runs as jobs of a Ray cluster; attaches to them, follows and stops them.

The only module that uses Ray's job submission. Guarantees: nothing starts before config, project,
cluster and paths were checked, and all problems are reported at once; a run that already has a
running job is attached to, not started twice; after an interruption a log continues where it
stopped, without losing or repeating a line; a job counts as lost only after `LOST_S` without an
answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dist_ft.cluster.jobs import job_request, package
from dist_ft.cluster.jobs.job_request import ENDED, Project, ProjectLocation, Request
from dist_ft.cluster.jobs.job_server import (
    JobInfo,
    Server,
    UnknownJobError,
    UnreachableError,
    are_all_local,
    check_capacity,
    find_version_problem,
    resolve_url,
)
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, WorkerError
from dist_ft.core.logs import redact
from dist_ft.model.loading.download import cache_folder

SILENT_S = 60.0
"""A log stream that is silent for this long is opened again: it may be cut unnoticed."""
POLL_S = 1.0
LOST_S = 300.0
DEFAULT_GRACE_S = "3"
"""Ray's own, for jobs that were submitted without one."""
PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a run is submitted.

    Attributes:
        address: the job server's URL; None: as the environment says.
        project: the project's folder.
        packaged: whether it is uploaded; None: unless the cluster is this machine.
        excludes: further patterns of files that are not uploaded.
        shared: folders that all nodes see.
        variables: NAME=VALUE of the job's environment.
        grace_s: seconds that a stop may take.
        skip_check: skip the probes of model and data.
        any_version: do not compare versions.
    """

    address: str | None = None
    project: str = "."
    packaged: bool | None = None
    excludes: Sequence[str] = ()
    shared: Sequence[str] = ()
    variables: Sequence[str] = ()
    grace_s: int = 600
    skip_check: bool = False
    any_version: bool = False


class PreparedJob(NamedTuple):
    """A checked job: its server, its request, and the run's job that already runs there, if any.

    `packed` is the project that the request names, if it is uploaded.
    """

    server: Server
    request: Request
    running_job: JobInfo | None
    packed: package.Package | None = None

    def remove_package(self) -> None:
        """Remove the packed project from this machine, once the cluster has it or needs it not."""
        if self.packed is not None:
            self.packed.remove()


def server_at(address: str | None) -> Server:
    """Return the job server at `address`, or where the environment says."""
    return Server(resolve_url(address))


def prepare(config: RunConfig, options: Options, print_line: PrintLine) -> PreparedJob:
    """Check config, project, cluster and paths; return the job that can be submitted.

    Args:
        config: the run.
        options: how to submit it.
        print_line: called with notices for the user.

    Raises:
        ConfigError: lists all problems that would prevent the run from starting.
        WorkerError: the cluster does not answer, or its versions do not fit.
    """
    server = server_at(options.address)
    folder = Path(options.project).expanduser().resolve()

    # all problems are collected, and raised together at the end
    problems: list[str] = []
    if not options.skip_check:
        problems = _check_config(config)
    if config.max_workers == 0:
        problems.append(
            "cluster.workers=0: trains in one process, but a job needs workers. Set it to 1 or "
            "more."
        )

    problems += job_request.find_variable_problems(options.variables)

    if not folder.is_dir():
        problems.append(f"--project={options.project}: no such folder. Correct the path.")
        # any existing folder: the remaining checks still run, and nothing is submitted
        folder = Path.cwd()

    # Raises at once: an old Ray does not answer the requests below.
    _require_versions(server, options.any_version)
    nodes = server.nodes()

    capacity = check_capacity(nodes, config)
    if capacity.problem and not config.cluster.wait_for_nodes:
        problems.append(capacity.problem)

    is_local_cluster = are_all_local(nodes)
    location = _project_location(options.packaged, is_local_cluster)
    excludes = (*package.EXCLUDES, *options.excludes)
    packed = package.PackedProject()
    if location == "package":
        packed = package.pack(folder, excludes, cache_folder(None, "packages"))
        problems += packed.problems

    project = Project(location, folder, excludes, packed.package)
    problems += job_request.find_path_problems(config, project, options.shared, is_local_cluster)

    if problems:
        packed.remove()
        raise ConfigError([redact(problem) for problem in problems], f"submit {config.run.name}")

    # Two jobs of one run would write to the same folder, so a running one is attached to.
    jobs = server.jobs()
    running = job_request.find_running_job(job_request.run_location(config, folder), jobs)

    # An attached job has its workers already, so the notice would be wrong for it.
    if capacity.wait_notice and running is None:
        print_line(capacity.wait_notice)

    request = job_request.create_request(
        config,
        project,
        name=job_request.next_job_name(config.run.name, jobs),
        grace_s=options.grace_s,
        variables=dict(text.split("=", 1) for text in options.variables),
        skip_check=options.skip_check,
    )
    return PreparedJob(server, request, running, packed.package)


def _require_versions(server: Server, any_version: bool) -> None:
    """Raise WorkerError if Ray is too old there, or versions differ without permission."""
    import ray

    versions = server.versions()
    problem = find_version_problem(versions, ray.__version__)
    is_too_old = versions.python is None
    if problem and (is_too_old or not any_version):
        raise WorkerError(f"--address={server.display_url}: {problem}")


def _project_location(packaged: bool | None, is_local_cluster: bool) -> ProjectLocation:
    if packaged is None:
        packaged = not is_local_cluster
    if packaged:
        return "package"

    return "local" if is_local_cluster else "image"


def _check_config(config: RunConfig) -> list[str]:
    """Return the problems from `dist-ft check`, without storage and this machine's devices."""
    from dist_ft.runtime.preflight import check_run

    # With an address, the check does not compare the run with this machine's CPUs and GPUs.
    cluster = config.cluster.model_copy(update={"address": "auto"})
    return check_run.check(config.model_copy(update={"cluster": cluster}), write_storage=False)


def submit(server: Server, request: Request) -> None:
    """Submit the job to the cluster, and upload the project if the job needs it.

    Raises:
        WorkerError: the cluster rejects the job.
    """
    try:
        # The client uploads the archive inside this call, so an OSError may come from reading it.
        _client(server).submit_job(
            entrypoint=request.entrypoint,
            submission_id=request.name,
            runtime_env=request.runtime_env,
            metadata=request.metadata,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = redact(" ".join(str(error).split()))[-300:]
        # Ray's reason may be a server's traceback over many lines; its end names the cause.
        raise WorkerError(
            f"job {request.name}: the cluster rejected it ({reason}). Nothing was started. Try "
            "again, or see dist-ft jobs list."
        ) from error


def _client(server: Server) -> Any:
    """Return Ray's client; without the variable it would use the environment's address."""
    from ray.job_submission import JobSubmissionClient

    # Ray's client overrides the given address with this variable, or with RAY_ADDRESS if it is
    # not set. Both may name another cluster.
    previous = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = server.url

    try:
        _silence_client()

        return JobSubmissionClient(server.url, headers=dict(server.headers))
    finally:
        os.environ.pop("RAY_API_SERVER_ADDRESS")
        if previous is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = previous


def _silence_client() -> None:
    """Silence the client's log of addresses and packing; importing it sets its loggers' levels."""
    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
        "ray._private.runtime_env.working_dir",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


class Follower:
    """Writes a job's log as it grows, across interrupted connections."""

    def __init__(
        self, server: Server, name: str, write: Callable[[str], None], print_line: PrintLine
    ) -> None:
        """Follow job `name`; `write` gets parts of its log, `print_line` our own notices."""
        self._server = server
        self._name = name
        self._write = write
        self._print_line = print_line

        self._num_written = 0  # characters of the log
        self._answered_at = time.monotonic()
        self._is_interrupted = False

    def follow(self) -> JobInfo:
        """Follow the log until the job has ended, and return the job.

        Raises:
            WorkerError: the cluster does not answer for `LOST_S`, or does not know the job any
                more.
        """
        while True:
            try:
                asyncio.run(self._stream())
            except (WorkerError, KeyboardInterrupt):
                raise
            except Exception as error:  # of sockets, of HTTP, of Ray: the log is requested again
                self._note_interruption(error)

            # The end of a stream says nothing about the job: a proxy may have cut it. Its status
            # decides.
            try:
                job = self._server.job(self._name)
                if job["status"] in ENDED:
                    # The stream may end before the last lines were sent; the stored log has all.
                    self._write_new(self._server.log(self._name), 0)
                    return job
                self._answered_at = time.monotonic()
            except UnknownJobError as error:
                raise WorkerError(
                    f"{error} If the cluster's head was restarted, the same command submits the "
                    "run again, and it resumes from its latest checkpoint."
                ) from error
            except UnreachableError as error:
                self._note_interruption(error)
                self._require_answer(error)

            time.sleep(POLL_S)

    def _require_answer(self, error: UnreachableError) -> None:
        if time.monotonic() - self._answered_at > LOST_S:
            raise WorkerError(
                f"job {self._name}: {self._server.display_url} has not answered for {LOST_S:.0f} "
                "s. The job may still run there. The same command attaches to it again."
            ) from error

    def _note_interruption(self, error: Exception) -> None:
        # one notice for each interruption, not one for each attempt to connect again
        if not self._is_interrupted:
            self._print_line(
                f"the log of job {self._name} was interrupted ({type(error).__name__}); the job "
                "continues; connecting again"
            )
        self._is_interrupted = True

    async def _stream(self) -> None:
        """Write new text until the stream ends; each stream starts at the beginning of the log."""
        # characters, not bytes: parts are decoded, and `_num_written` counts the same
        position = 0
        stream = _client(self._server).tail_job_logs(self._name)
        try:
            while True:
                # A half-open connection looks like a job that prints nothing; a new one is cheap.
                text = await asyncio.wait_for(anext(stream), SILENT_S)
                self._write_new(text, position)
                position += len(text)
        except (StopAsyncIteration, asyncio.TimeoutError):
            return
        finally:
            # closes the websocket in this event loop, which ends with this call
            await stream.aclose()

    def _write_new(self, text: str, position: int) -> None:
        """Write the part of `text`, which is at `position` of the log, that was not written yet."""
        # A stream starts over, so the first part of `text`, or all of it, may be written already.
        new_text = text[max(0, self._num_written - position) :]
        if new_text:
            self._num_written += len(new_text)
            self._is_interrupted = False
            self._answered_at = time.monotonic()
            self._write(redact(new_text))


def stop(server: Server, name: str, print_line: PrintLine) -> JobInfo:
    """Make a job save and end, wait until it has ended, and return it.

    Raises:
        WorkerError: it did not end in time.
    """
    job = server.job(name)
    if job["status"] in ENDED:
        print_line(f"job {name} has already ended ({job['status']})")
        return job

    # Ray sends SIGTERM now, and SIGKILL after the job's own grace period.
    server.stop(name)
    variables = (job.get("runtime_env") or {}).get("env_vars", {})
    grace_s = variables.get("RAY_JOB_STOP_WAIT_TIME_S", DEFAULT_GRACE_S)

    print_line(f"sent job {name} a stop request; it saves first (killed after {grace_s} s)")
    until = time.monotonic() + float(grace_s) + LOST_S

    while job["status"] not in ENDED:
        if time.monotonic() > until:
            raise WorkerError(f"job {name}: did not end in time. See dist-ft jobs logs {name}.")

        time.sleep(POLL_S)
        # a head that is busy with the stop may not answer for a moment
        with contextlib.suppress(UnreachableError):
            job = server.job(name)
    return job
