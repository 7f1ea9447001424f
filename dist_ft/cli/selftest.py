"""The commands `dist-ft drill | selftest`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any

import typer

from dist_ft.cli.arguments import Overrides, is_config_file

DEFAULT_CONFIG: dict[str, Any] = {
    "run": {"name": "drill"},
    "model": {"path": "made-by-the-drill", "dtype": "float32"},
    "data": {"train": "made-by-the-drill"},
    "batch": {"global_batch": 2**16, "sequence_length": 64},
    "schedule": {"steps": 1},
    "checkpoint": {"every_steps": 1},
}
"""The config of a drill without one. Any number of workers fits its batch. Only the number format
and the defaults of all other fields matter, as the drill brings its own model and data."""


def drill(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file (path or URL) of a run. Its cluster, storage and zero sections are "
            "used. Default: this process, ./runs.",
        ),
    ] = None,
    overrides: Overrides = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="Only this one: death, hang, preemption or storage. Repeatable."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the drill's folder even if everything passed.")
    ] = False,
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="PATH", help="Also write the results as JSON."),
    ] = None,
) -> None:
    """Inject faults into short runs on your own cluster and storage, and check that they recover.

    A small model is trained undisturbed, then again with a worker killed, a worker that hangs,
    SIGTERM, and storage that fails. Each run must end with bit-equal losses, every sample counted
    once, and every checkpoint intact. Takes minutes. Works in a new folder below run.storage, which
    is removed if everything passed. Exits 1 if something did not.

    \b
    Examples:
      dist-ft drill configs/llama-8b.yaml
      dist-ft drill cluster.workers=2 run.storage=s3://bucket/runs --scenario death

    Next: dist-ft train CONFIG
    """
    from pathlib import Path

    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.selftest import drill as drills
    from dist_ft.selftest.drill_scenarios import NAMES

    _require_known("--scenario", scenario or (), NAMES[1:], "drill")
    quiet_third_parties()
    _sigterm_as_ctrl_c()

    if _is_override(config):
        run = load_config(DEFAULT_CONFIG, [*([config] if config else []), *(overrides or ())])
    else:
        run = load_config(config or "", overrides or ())
    report = drills.run(run, scenario or (), keep, typer.echo)

    typer.echo(drills.describe(report))
    if json_out is not None:
        Path(json_out).write_text(drills.as_json(report))
    if not report.passed:
        raise typer.Exit(1)


def selftest(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file (path or URL) of a run. Its cluster, storage and zero sections are "
            "used. Default: one worker for each GPU of this machine (two on the CPU without GPUs), "
            "./runs.",
        ),
    ] = None,
    overrides: Overrides = None,
    check: Annotated[
        list[str] | None,
        typer.Option(help="Only this one: parity, collective, resume or throughput. Repeatable."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the selftest's folder even if everything passed.")
    ] = False,
    out: Annotated[str, typer.Option(help="Local folder for selftest.json and selftest.md.")] = ".",
) -> None:
    """Check in a few minutes that dist_ft keeps its promises on your GPUs, and write a report.

    A small model is trained in one process and by ZeRO-1, 2 and 3 on all workers (same losses?),
    with a worker killed and on another number of workers (does it resume?). Collectives and pairs
    of nodes are verified and timed. A larger model measures training speed. Works in a new folder
    below run.storage, removed if everything passed. The report holds versions, devices, figures and
    verdicts, but no names of nodes. Exits 1 if something failed.

    \b
    Examples:
      dist-ft selftest --out report/
      dist-ft selftest configs/llama-8b.yaml --check parity --check collective

    Next: dist-ft drill CONFIG injects more faults on that cluster and storage.
    """
    from pathlib import Path

    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.selftest import selftest as selftests
    from dist_ft.selftest.checks import CHECKS
    from dist_ft.selftest.report import to_markdown

    _require_known("--check", check or (), CHECKS, "selftest")
    quiet_third_parties()
    _sigterm_as_ctrl_c()

    if _is_override(config):
        given = [*([config] if config else []), *(overrides or ())]
        run = selftests.detect_config(DEFAULT_CONFIG, given)
    else:
        run = load_config(config or "", overrides or ())
    report = selftests.run(run, check or (), keep, typer.echo)

    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selftest.json").write_text(selftests.as_json(report), "utf-8")
    (folder / "selftest.md").write_text(to_markdown(report), "utf-8")
    typer.echo(selftests.describe(report))
    typer.echo(f"wrote selftest.json and selftest.md in {out}; attach them to a bug report")
    if not report.passed:
        raise typer.Exit(1)


def _require_known(
    option: str, names: Sequence[str], allowed: Collection[str], command: str
) -> None:
    """Raise ConfigError with a line for every name that is not allowed."""
    from dist_ft.core.errors import ConfigError

    problems = [
        f"{option}={name}: unknown name. Allowed: {', '.join(allowed)}."
        for name in names
        if name not in allowed
    ]
    if problems:
        raise ConfigError(problems, command)


def _sigterm_as_ctrl_c() -> None:
    """Make SIGTERM act as Ctrl-C, so that no run this command started is left behind."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _is_override(config: str | None) -> bool:
    """Return whether no config is given, so that its argument is the first override."""
    return config is None or ("=" in config and not is_config_file(config))
