"""The commands `dist-ft drill | selftest`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Overrides, is_config_file

DEFAULT_CONFIG: dict[str, Any] = {
    "run": {"name": "drill"},
    "model": {"path": "built-by-the-drill", "dtype": "float32"},
    "data": {"train": "built-by-the-drill"},
    "batch": {"global_batch": 2**16, "sequence_length": 64},
    "schedule": {"steps": 1},
    "checkpoint": {"every_steps": 1},
}
"""The config of a drill or self-test if the user gives none. Its batch fits any number of workers.
The model and the data are placeholders: the drill or self-test builds its own."""


def drill(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file (path or URL) of a run. Its cluster, storage and zero sections are "
            "used. Default: train in this process and write to ./runs.",
        ),
    ] = None,
    overrides: Overrides = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only this scenario: death, hang, preemption or storage. Repeatable."
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the drill's folder even if all scenarios pass.")
    ] = False,
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="PATH", help="Also write the results as JSON."),
    ] = None,
) -> None:
    """Inject faults into short runs on your own cluster and storage, and check that they recover.

    Trains a small model without faults, then again with a killed worker, a worker that hangs,
    SIGTERM, and storage errors. Each run must end with bit-equal losses, every sample counted once,
    and every checkpoint intact. Takes minutes. Works in a new folder in run.storage and removes it
    if all scenarios pass. Exits with 1 if a scenario fails.

    \b
    Examples:
      dist-ft drill configs/llama-8b.yaml
      dist-ft drill cluster.workers=2 run.storage=s3://bucket/runs --scenario death

    Next: dist-ft train CONFIG
    """
    from pathlib import Path

    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.selftest import drill as fault_drill
    from dist_ft.selftest.drill_scenarios import NAMES

    # The first scenario is the run without faults, which all others are compared with.
    _require_known("--scenario", scenario or (), NAMES[1:], "drill")
    quiet_third_parties()
    _interrupt_on_sigterm()

    if _is_missing_or_override(config):
        run = load_config(DEFAULT_CONFIG, _all_overrides(config, overrides))
    else:
        run = load_config(config or "", overrides or ())
    report = fault_drill.run(run, scenario or (), keep, typer.echo)

    output.echo(fault_drill.describe(report))
    if json_out is not None:
        Path(json_out).write_text(fault_drill.as_json(report))

    # After everything is written: a failed scenario is when the results are needed.
    if not report.passed:
        raise typer.Exit(1)


def selftest(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file (path or URL) of a run. Its cluster, storage and zero sections are "
            "used. Default: one worker for each GPU of this machine (without GPUs: two on the "
            "CPU), and write to ./runs.",
        ),
    ] = None,
    overrides: Overrides = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only this check: parity, collective, resume or throughput. Repeatable."
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the self-test's folder even if all checks pass.")
    ] = False,
    out: Annotated[str, typer.Option(help="Local folder for selftest.json and selftest.md.")] = ".",
) -> None:
    """Check in a few minutes that dist_ft works correctly on your GPUs, and write a report.

    Trains a small model in one process and with ZeRO-1, 2 and 3 on all workers, and compares the
    losses. Resumes it after a killed worker and on another number of workers. Verifies and times
    collectives and pairs of nodes. Measures training speed with a larger model. Works in a new
    folder in run.storage and removes it if all checks pass. The report holds versions, devices,
    measurements and verdicts, but no names of nodes. Exits with 1 if a check fails.

    \b
    Examples:
      dist-ft selftest --out report/
      dist-ft selftest configs/llama-8b.yaml --check parity --check collective

    Next: dist-ft drill CONFIG injects more faults on that cluster and storage.
    """
    from pathlib import Path

    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.selftest import selftest as self_test
    from dist_ft.selftest.checks import CHECKS
    from dist_ft.selftest.report import to_markdown

    _require_known("--check", check or (), CHECKS, "selftest")
    quiet_third_parties()
    _interrupt_on_sigterm()

    # Without a config, the number of workers follows from the GPUs of this machine.
    if _is_missing_or_override(config):
        run = self_test.detect_config(DEFAULT_CONFIG, _all_overrides(config, overrides))
    else:
        run = load_config(config or "", overrides or ())
    report = self_test.run(run, check or (), keep, typer.echo)

    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selftest.json").write_text(self_test.as_json(report), "utf-8")
    (folder / "selftest.md").write_text(to_markdown(report), "utf-8")

    output.echo(self_test.describe(report))
    output.echo(f"wrote selftest.json and selftest.md in {out}; attach them to a bug report")

    if not report.passed:
        raise typer.Exit(1)


def _require_known(
    option: str, names: Sequence[str], allowed: Collection[str], command: str
) -> None:
    """Raise ConfigError with one line for each name that is not allowed."""
    from dist_ft.core.errors import ConfigError

    problems = []
    for name in names:
        if name not in allowed:
            problems.append(
                f"{option}={name}: unknown name. Allowed: {', '.join(allowed)}. Use one of these."
            )
    if problems:
        raise ConfigError(problems, command)


def _interrupt_on_sigterm() -> None:
    """Make SIGTERM act as Ctrl-C, so that this command stops the runs that it started."""
    import signal

    # By default SIGTERM ends a process at once; the runs, other processes, would be left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _all_overrides(config: str | None, overrides: list[str] | None) -> list[str]:
    """Return the overrides, of which the argument CONFIG may be the first."""
    first = [config] if config else []
    return [*first, *(overrides or ())]


def _is_missing_or_override(config: str | None) -> bool:
    """Return whether the argument CONFIG is missing, or is the first override instead of a file."""
    # CONFIG is optional, so the parser takes the first argument for it, whatever it is. The name of
    # a file may contain "=" too.
    return config is None or ("=" in config and not is_config_file(config))
