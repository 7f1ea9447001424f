"""The commands `dist-ft submit` and `dist-ft jobs list | status | logs | stop`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Config, Overrides

HELP = (
    "Manage runs submitted to a Ray cluster.\n\n\b\nFirst steps:\n"
    "  dist-ft jobs list                list the jobs\n"
    "  dist-ft jobs logs --follow NAME  follow the log of one\n"
    "  dist-ft jobs stop NAME           save a checkpoint and stop"
)

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Job server of the cluster. Default: RAY_API_SERVER_ADDRESS, else "
        "http://127.0.0.1:8265.",
    ),
]
Job = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Submission id: the run's name, or name-2, name-3, ..."),
]


def commands(register: Callable[..., Any]) -> None:
    """Pass every command to `register`, which takes (function) or (function, name)."""
    register(list_jobs, "list")
    for command in (status, logs, stop):
        register(command)


def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    print_only: Annotated[
        bool,
        typer.Option("--print", help="Check, then only print the equivalent `ray job submit`."),
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the job.")] = False,
    project: Annotated[
        str, typer.Option(metavar="DIR", help="Project folder that is uploaded with the job.")
    ] = ".",
    package: Annotated[
        bool | None,
        typer.Option(
            "--package/--no-package",
            help="Upload the project, or use the one in the image. Default: upload, unless the "
            "cluster is this machine.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Files not to upload, in addition to .gitignore, .rayignore and the usual ones. "
            "Repeatable.",
        ),
    ] = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Local folder that all nodes see (a mounted share, the image). Repeatable.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Environment variable of the job and its workers. No credentials. Repeatable.",
        ),
    ] = None,
    grace: Annotated[
        int,
        typer.Option(
            min=3,
            metavar="SECONDS",
            help="Time a stopped job has to save a checkpoint before it is killed.",
        ),
    ] = 600,
    skip_check: Annotated[
        bool,
        typer.Option(
            "--skip-check",
            help="Skip the probes of `check` (if only the workers can reach model and data).",
        ),
    ] = False,
    any_version: Annotated[
        bool,
        typer.Option(
            "--any-version", help="Allow Ray and Python versions that differ from the cluster's."
        ),
    ] = False,
) -> None:
    """Run a fine-tuning as a job of a Ray cluster, and follow it to its end.

    Checks config, project, cluster and paths first; nothing starts if something is wrong. If the
    run already has a job, attaches to it. If that job has ended, the run resumes from its latest
    checkpoint. Ctrl-C leaves the job running. Exits with the job's own code, and 130 if the job was
    stopped.

    \b
    Examples:
      dist-ft submit configs/llama-8b.yaml run.storage=s3://bucket/runs --address http://head:8265
      dist-ft submit configs/llama-8b.yaml cluster.workers=4..16 --no-wait

    Next: dist-ft jobs logs --follow NAME, dist-ft jobs stop NAME
    """
    from dist_ft.cluster.jobs import submission
    from dist_ft.config.load import load_config
    from dist_ft.core.errors import Interrupted
    from dist_ft.core.logs import quiet_third_parties, redact

    quiet_third_parties()
    options = submission.Options(
        address,
        project,
        package,
        exclude or (),
        shared or (),
        env or (),
        grace,
        skip_check,
        any_version,
    )
    prepared = submission.prepare(load_config(config, overrides or ()), options, _print_status)
    server = prepared.server
    request = prepared.request
    running = prepared.running_job

    if print_only:
        output.echo(request.submit_command(redact(server.url), bool(server.headers)))
        if prepared.packed is not None:
            _print_status(f"packed the project into {prepared.packed.archive}; remove it after use")
        return

    if running is None:
        name = request.name
        try:
            submission.submit(server, request)
        finally:
            prepared.remove_package()
        _print_status(f"job {name} is submitted to {server.display_url}")
    else:
        prepared.remove_package()
        # Two jobs of one run would compete for its checkpoints. The command contains the config.
        name = str(running["submission_id"])
        note = ""
        if running.get("entrypoint") != request.entrypoint:
            note = ". It was started with another config and keeps it. Stop it first to change it."
        _print_status(f"attached to job {name} of this run ({running['status']}){note}")

    if no_wait:
        output.echo(f"next: dist-ft jobs logs --follow {name}")
        return

    # Ctrl-C ends this command, not the job, which is a process of the cluster.
    try:
        _follow(server, name)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"job {name} keeps running. Follow it with dist-ft jobs logs --follow {name} or the "
            f"same command. Save and stop it with dist-ft jobs stop {name}."
        ) from error


def list_jobs(address: Address = None) -> None:
    """List the runs submitted to a cluster, latest last.

    \b
    Examples:
      dist-ft jobs list --address http://127.0.0.1:8265
      dist-ft jobs list --address http://head:8265

    Next: dist-ft jobs status NAME
    """
    from dist_ft.cluster.jobs import job_request, submission

    # The cluster may run other jobs too.
    jobs = []
    for job in submission.server_at(address).jobs():
        if job_request.RUN_KEY in (job.get("metadata") or {}):
            jobs.append(job)

    # A pending job has no start time yet.
    for job in sorted(jobs, key=lambda job: job.get("start_time") or 0):
        output.echo(_describe(job))

    plural = "" if len(jobs) == 1 else "s"
    output.echo(f"{len(jobs)} job{plural}")


def status(name: Job, address: Address = None) -> None:
    """Show the status of a job. Exits with the job's own code if it has ended.

    \b
    Examples:
      dist-ft jobs status mine
      dist-ft jobs status mine-2 --address http://head:8265

    Next: dist-ft jobs logs NAME
    """
    from dist_ft.cluster.jobs import job_request, submission

    job = submission.server_at(address).job(name)
    output.echo(_describe(job))

    # The exit code makes the command usable in scripts that wait for a job.
    has_ended = job["status"] in job_request.ENDED
    raise typer.Exit(job_request.exit_code(job) if has_ended else 0)


def logs(
    name: Job,
    follow: Annotated[
        bool, typer.Option("--follow", help="Follow until the job ends; exits with its code.")
    ] = False,
    address: Address = None,
) -> None:
    """Show the log of a job.

    \b
    Examples:
      dist-ft jobs logs mine
      dist-ft jobs logs --follow mine

    Next: dist-ft jobs stop NAME, or dist-ft runs show STORAGE/NAME
    """
    from dist_ft.cluster.jobs import submission
    from dist_ft.core.errors import Interrupted
    from dist_ft.core.logs import redact

    server = submission.server_at(address)

    # Raises an error for an unknown name.
    server.job(name)
    if not follow:
        # The job redacts the secrets of its nodes; this one, those of this machine.
        output.write_log(redact(server.log(name)))
        return

    try:
        _follow(server, name)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"job {name} keeps running. Save and stop it with dist-ft jobs stop {name}."
        ) from error


def stop(name: Job, address: Address = None) -> None:
    """Make a job save a checkpoint and end, and wait until it has ended.

    The command that submitted it resumes the run.

    \b
    Examples:
      dist-ft jobs stop mine
      dist-ft jobs stop mine-2 --address http://head:8265

    Next: dist-ft submit CONFIG resumes the run
    """
    from dist_ft.cluster.jobs import submission

    job = submission.stop(submission.server_at(address), name, _print_status)
    output.echo(_describe(job))


def _follow(server: Any, name: str) -> None:
    """Print a job's log until it ends, and exit with its code."""
    from dist_ft.cluster.jobs import job_request, submission

    job = submission.Follower(server, name, _write, _print_status).follow()
    _print_status(_describe(job))
    raise typer.Exit(job_request.exit_code(job))


def _describe(job: Any) -> str:
    """Return one line about a job."""
    from dist_ft.cluster.jobs import job_request
    from dist_ft.core.logs import redact

    has_ended = job["status"] in job_request.ENDED
    code = f", exit code {job_request.exit_code(job)}" if has_ended else ""

    # Without an exit code the job failed before its command ran (its environment could not be
    # built), and Ray's message is the only explanation. Otherwise the log has a better one.
    reason = ""
    message_lines = (job.get("message") or "").strip().splitlines()
    never_started = job["status"] == "FAILED" and job.get("driver_exit_code") is None
    if never_started and message_lines:
        reason = f"; {message_lines[0][:200]}"

    run = (job.get("metadata") or {}).get(job_request.RUN_KEY)
    return redact(f"{job['submission_id']}: {job['status']}{code}; run {run}{reason}")


def _write(text: str) -> None:
    output.write_log(text)


def _print_status(text: str) -> None:
    # On stderr: stdout holds the log of the job alone.
    output.echo(f"dist-ft: {text}", err=True)
