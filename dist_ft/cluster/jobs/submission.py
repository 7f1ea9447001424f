"""Runs as jobs of a Ray cluster: submit, attach, watch, stop. The door to Ray's job submission.

Guarantees: nothing starts before config, project, cluster and paths were looked at, and all that is wrong is said at
once; a run that has a living job is attached to, not started twice; a log that breaks off goes on where it was, without
losing or doubling a line; a job is only called lost after `LOST_S` without an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_ft.cluster.jobs import job_request, package
from dist_ft.cluster.jobs.job_request import ENDED, Request, Where
from dist_ft.cluster.jobs.job_server import (
    Server,
    UnknownJobError,
    UnreachableError,
    are_here,
    resolve,
    room_problem,
    version_problem,
)
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError, WorkerError
from dist_ft.core.logs import redact

SILENT_S = 60.0
"""A stream that says nothing for so long is opened anew: it may be cut without either end knowing."""
PAUSE_S = 1.0
LOST_S = 300.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How a run is submitted.

    Attributes:
        address: the job server's URL; None: as the environment says.
        project: folder that is sent along.
        packaged: whether it is; None: unless the cluster is this machine.
        excludes: further patterns of what is not sent.
        shared: folders that all nodes see.
        variables: NAME=VALUE of the job's environment.
        grace_s: seconds a stop may take.
        skip_check: leave out the probes of model and data.
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


def server_at(address: str | None) -> Server:
    """Return the job server at `address` or where the environment says."""
    return Server(resolve(address))


def prepare(
    config: RunConfig, options: Options, say: Say
) -> tuple[Server, Request, Mapping[str, Any] | None]:
    """Look at everything; return the server, the job to be and the run's living job, if there is one.

    Raises ConfigError with all that would keep the run from starting, WorkerError if the cluster can't be asked.
    """
    server, folder = server_at(options.address), Path(options.project).expanduser().resolve()
    problems = [] if options.skip_check else _checked(config)
    if config.max_workers == 0:
        problems.append(
            "cluster.workers=0: trains in one process, and a job asks a cluster for workers; 1 or more are "
            "allowed; set it"
        )
    problems += job_request.variable_problems(options.variables)
    if not folder.is_dir():
        problems.append(f"--project={options.project}: no such folder; check it")
        folder = Path.cwd()
    import ray

    theirs = server.versions()
    wrong = version_problem(theirs, ray.__version__)
    if wrong and (theirs[1] is None or not options.any_version):
        raise WorkerError(f"--address={server.shown}: {wrong}")
    nodes = server.nodes()
    local = are_here(nodes)
    where: Where = (
        "package"
        if options.packaged or (options.packaged is None and not local)
        else ("here" if local else "image")
    )
    excludes = [*package.EXCLUDES, *options.excludes]
    problems += job_request.path_problems(config, where, folder, options.shared, local, excludes)
    if where == "package":
        problems += package.problems(folder, excludes)
    never, now = room_problem(nodes, config)
    problems += [never] if never and not config.cluster.wait_for_nodes else []
    if problems:
        raise ConfigError([redact(problem) for problem in problems], f"submit {config.run.name}")
    jobs = server.jobs()
    living = job_request.living(job_request.place(config, folder), jobs)
    if now and living is None:
        say(now)
    variables = dict(text.split("=", 1) for text in options.variables)
    return (
        server,
        job_request.make(
            config,
            where,
            folder,
            name=job_request.name_for(config.run.name, jobs),
            grace_s=options.grace_s,
            excludes=excludes,
            variables=variables,
            skip_check=options.skip_check,
        ),
        living,
    )


def _checked(config: RunConfig) -> list[str]:
    """Return what `dist-ft check` finds without the run's storage and this machine's CPUs and GPUs."""
    from dist_ft.runtime.preflight import check_run

    there = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"address": "auto"})}
    )
    return check_run.check(there, write_storage=False)


def submit(server: Server, request: Request) -> None:
    """Hand the job to the cluster, with the project if it is to go along."""
    try:
        _client(server).submit_job(
            entrypoint=request.entrypoint,
            submission_id=request.name,
            runtime_env=request.runtime_env,
            metadata=request.metadata,
        )
    except (RuntimeError, ValueError, OSError) as error:
        said = redact(" ".join(str(error).split()))[-300:]
        raise WorkerError(
            f"job {request.name}: the cluster did not take it ({said}); nothing was started; try again, "
            "or see dist-ft jobs list"
        ) from error


def _client(server: Server) -> Any:
    """Return Ray's client; it would follow the environment rather than what it is given."""
    from ray.job_submission import JobSubmissionClient

    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = server.url
    try:
        _quiet()
        return JobSubmissionClient(server.url, headers=dict(server.headers))
    finally:
        os.environ.pop("RAY_API_SERVER_ADDRESS")
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


def _quiet() -> None:
    """Have Ray's client not tell how it reads an address and packs; it sets its loggers' levels when it is imported."""
    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
        "ray._private.runtime_env.working_dir",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


class Follower:
    """Writes a job's log as it grows, across broken connections."""

    def __init__(self, server: Server, name: str, write: Say, say: Say) -> None:
        """Follow job `name`; `write` takes pieces of its log, `say` a line of our own."""
        self._server, self._name, self._write, self._say = server, name, write, say
        self._num_written = 0
        self._heard_at = time.monotonic()
        self._broken = False

    def follow(self) -> Mapping[str, Any]:
        """Return what is known of the job once it has ended; raises WorkerError if the cluster stays away."""
        while True:
            try:
                asyncio.run(self._tail())
            except (WorkerError, KeyboardInterrupt):
                raise
            except (
                Exception
            ) as error:  # of sockets, of HTTP, of Ray: whatever it was, the log is asked for again
                self._note(error)
            try:
                job = self._server.job(self._name)
                if job["status"] in ENDED:
                    self._take(self._server.log(self._name), 0)
                    return job
                self._heard_at = time.monotonic()
            except UnknownJobError as error:
                raise WorkerError(
                    f"{error}; if the cluster's head was started anew, the same command submits the run "
                    "again, and it goes on from its newest checkpoint"
                ) from error
            except UnreachableError as error:
                self._note(error)
                if time.monotonic() - self._heard_at > LOST_S:
                    raise WorkerError(
                        f"job {self._name}: {self._server.shown} has not answered for {LOST_S:.0f} s; "
                        "the job may go on there; the same command attaches to it again"
                    ) from error
            time.sleep(PAUSE_S)

    def _note(self, error: Exception) -> None:
        if not self._broken:
            self._say(
                f"the log of job {self._name} broke off ({type(error).__name__}); the job goes on; asking again"
            )
        self._broken = True

    async def _tail(self) -> None:
        """Write what is new until the stream ends; it begins at the log's beginning each time."""
        seen, pieces = 0, _client(self._server).tail_job_logs(self._name)
        try:
            while True:
                piece = await asyncio.wait_for(anext(pieces), SILENT_S)
                self._take(piece, seen)
                seen += len(piece)
        except (StopAsyncIteration, asyncio.TimeoutError):
            return
        finally:
            await pieces.aclose()

    def _take(self, text: str, begins_at: int) -> None:
        """Write the part of `text`, which begins at this place of the log, that was not written yet."""
        new = text[max(0, self._num_written - begins_at) :]
        if new:
            self._num_written += len(new)
            self._broken = False
            self._heard_at = time.monotonic()
            self._write(redact(new))


def stop(server: Server, name: str, say: Say) -> Mapping[str, Any]:
    """Ask a job to save and end, wait until it has, and return what is known of it."""
    job = server.job(name)
    if job["status"] in ENDED:
        say(f"job {name} has ended already ({job['status']})")
        return job
    server.stop(name)
    grace = (job.get("runtime_env") or {}).get("env_vars", {}).get("RAY_JOB_STOP_WAIT_TIME_S", "3")
    say(f"asked job {name} to stop; it saves first (killed after {grace} s)")
    until = time.monotonic() + float(grace) + LOST_S
    while job["status"] not in ENDED:
        if time.monotonic() > until:
            raise WorkerError(f"job {name}: has not ended in time; see dist-ft jobs logs {name}")
        time.sleep(PAUSE_S)
        with contextlib.suppress(UnreachableError):
            job = server.job(name)
    return job
