"""The commands `dist-ft submit` and `dist-ft jobs list | status | logs | stop`; `cli` hangs them in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli.data import Config, Overrides

HELP = (
    "Look after runs that were submitted to a Ray cluster.\n\n\b\nFirst steps:\n"
    "  dist-ft jobs list               which are there?\n"
    "  dist-ft jobs logs --follow NAME what does it say?\n"
    "  dist-ft jobs stop NAME          it saves, and ends"
)
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help=(
            "Job server of the cluster; none: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."
        ),
    ),
]
Job = Annotated[
    str,
    typer.Argument(metavar="NAME", help="Submission id: the run's name, or name-2, name-3, ..."),
]


def commands(register: Callable[..., Any]) -> None:
    """Hand every command to `register`, which takes (function) or (function, name)."""
    register(list_jobs, "list")
    for command in (status, logs, stop):
        register(command)


def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    print_only: Annotated[
        bool,
        typer.Option(
            "--print", help=("Check, then only print the `ray job submit` line that does the same.")
        ),
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not watch the job.")] = False,
    project: Annotated[str, typer.Option(metavar="DIR", help="Folder that is sent along.")] = ".",
    package: Annotated[
        bool | None,
        typer.Option(
            "--package/--no-package",
            help=(
                "Send the project along, or use the image's; none: send, unless the cluster is this machine."
            ),
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help=("Besides .gitignore and the usual, leave this out; may be given several times."),
        ),
    ] = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help=("Local paths below it are seen by all nodes (a mounted share, the image)."),
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help=("Environment variable of the job and its workers; no credentials."),
        ),
    ] = None,
    grace: Annotated[
        int,
        typer.Option(
            min=3,
            metavar="SECONDS",
            help=("A stop may take so long to save, then the job is killed."),
        ),
    ] = 600,
    skip_check: Annotated[
        bool,
        typer.Option(
            "--skip-check",
            help=("Leave out the probes of `check` (where only the workers see model and data)."),
        ),
    ] = False,
    any_version: Annotated[
        bool,
        typer.Option(
            "--any-version", help=("Do not insist on the same Ray and Python here and there.")
        ),
    ] = False,
) -> None:
    """Run a fine-tuning as a job of a Ray cluster, and watch it to its end.

    Looks at config, project, cluster and paths first; nothing starts if something is wrong. A run that has a job there
    is attached to, and one whose job has ended goes on from its newest checkpoint. Ctrl-C leaves the job running. Exits
    with the job's own code, and 130 if it was stopped.

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
    given = load_config(config, overrides or ())
    server, request, living = submission.prepare(
        given,
        submission.Options(
            address,
            project,
            package,
            exclude or (),
            shared or (),
            env or (),
            grace,
            skip_check,
            any_version,
        ),
        _say,
    )
    if print_only:
        typer.echo(request.line(redact(server.url), bool(server.headers)))
        return
    name = request.name if living is None else str(living["submission_id"])
    if living is None:
        submission.submit(server, request)
        _say(f"job {name} is submitted to {server.shown}")
    else:
        changed = living.get("entrypoint") != request.entrypoint
        _say(
            f"job {name} of this run is there already ({living['status']}); attached to it"
            + (
                "; it was started with another config, which stays: stop it first to change it"
                if changed
                else ""
            )
        )
    if no_wait:
        typer.echo(f"next: dist-ft jobs logs --follow {name}")
        return
    try:
        _watch(server, name)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"job {name} goes on; watch it again: dist-ft jobs logs --follow {name} (or the same "
            f"command); end it, saved: dist-ft jobs stop {name}"
        ) from error


def list_jobs(address: Address = None) -> None:
    """Name the runs that were submitted to a cluster, newest last.

    \b
    Examples:
      dist-ft jobs list --address http://127.0.0.1:8265
      dist-ft jobs list --address http://head:8265

    Next: dist-ft jobs status NAME
    """
    from dist_ft.cluster.jobs import job_request, submission

    found = [
        job
        for job in submission.server_at(address).jobs()
        if job_request.RUN in (job.get("metadata") or {})
    ]
    for job in sorted(found, key=lambda job: job.get("start_time") or 0):
        typer.echo(_line(job))
    typer.echo(f"{len(found)} job{'s' * (len(found) != 1)}")


def status(name: Job, address: Address = None) -> None:
    """Tell how a job stands; exits with its own code if it has ended.

    \b
    Examples:
      dist-ft jobs status mine
      dist-ft jobs status mine-2 --address http://head:8265

    Next: dist-ft jobs logs NAME
    """
    from dist_ft.cluster.jobs import job_request, submission

    job = submission.server_at(address).job(name)
    typer.echo(_line(job))
    raise typer.Exit(job_request.exit_code(job) if job["status"] in job_request.ENDED else 0)


def logs(
    name: Job,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job ends; exits with its code.")
    ] = False,
    address: Address = None,
) -> None:
    """Show what a job has said.

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
    server.job(name)
    if not follow:
        typer.echo(redact(server.log(name)), nl=False)
        return
    try:
        _watch(server, name)
    except KeyboardInterrupt as error:
        raise Interrupted(f"job {name} goes on; end it, saved: dist-ft jobs stop {name}") from error


def stop(name: Job, address: Address = None) -> None:
    """Have a job save and end, and wait until it has. The command that submitted it goes on from there.

    \b
    Examples:
      dist-ft jobs stop mine
      dist-ft jobs stop mine-2 --address http://head:8265

    Next: dist-ft submit CONFIG goes on
    """
    from dist_ft.cluster.jobs import submission

    typer.echo(_line(submission.stop(submission.server_at(address), name, _say)))


def _watch(server: Any, name: str) -> None:
    """Show a job's log until it ends, and exit with its code."""
    from dist_ft.cluster.jobs import job_request, submission

    job = submission.Follower(server, name, _write, _say).follow()
    code = job_request.exit_code(job)
    _say(_line(job))
    raise typer.Exit(code)


def _line(job: Any) -> str:
    """Return one line on a job."""
    from dist_ft.cluster.jobs import job_request
    from dist_ft.core.logs import redact

    code = f", exit code {job_request.exit_code(job)}" if job["status"] in job_request.ENDED else ""
    said = (job.get("message") or "").strip().splitlines()
    why = (
        f"; {said[0][:200]}"
        if job["status"] == "FAILED" and job.get("driver_exit_code") is None and said
        else ""
    )
    run = (job.get("metadata") or {}).get(job_request.RUN)
    return redact(f"{job['submission_id']}: {job['status']}{code}; run {run}{why}")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    typer.echo(f"dist-ft: {text}", err=True)
