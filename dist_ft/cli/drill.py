"""The commands `dist-ft drill | selftest`; `cli` hangs them in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dist_ft.cli.data import Overrides

ALONE: dict[str, Any] = {
    "run": {"name": "drill"},
    "model": {"path": "made-by-the-drill", "dtype": "float32"},
    "data": {"train": "made-by-the-drill"},
    "batch": {"global_batch": 2**16, "sequence_length": 64},
    "schedule": {"steps": 1},
    "checkpoint": {"every_steps": 1},
}
"""What a drill without a config starts from: any number of workers, or range of them, fits. Of this only the number
format and the defaults of all else matter."""


def drill(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help=(
                "YAML file (path or URL) of a run: its cluster, storage and zero sections are used. None: this process, "
                "./runs."
            ),
        ),
    ] = None,
    overrides: Overrides = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one: death, hang, preemption or storage; may be given several times."
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the drill's folder though all held.")
    ] = False,
    json_out: Annotated[
        str | None,
        typer.Option("--json", metavar="PATH", help=("Also write what was found as JSON.")),
    ] = None,
) -> None:
    """Disturb short runs on your own cluster and storage, and see whether they come through.

    A small model is trained undisturbed, then again with a worker killed, a worker that hangs, SIGTERM, and storage
    that fails. Each must end with the same losses to the last bit, every sample counted once, every checkpoint sound.
    Takes minutes. Works in a new folder below run.storage, which is removed if all held. Exits 1 if something did not.

    \b
    Examples:
      dist-ft drill configs/llama-8b.yaml
      dist-ft drill cluster.workers=2 run.storage=s3://bucket/runs --scenario death

    Next: dist-ft train CONFIG
    """
    import signal
    from pathlib import Path

    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.selftest import drill as drills
    from dist_ft.selftest.drill_scenarios import NAMES

    unknown = [name for name in scenario or () if name not in NAMES[1:]]
    if unknown:
        raise ConfigError(
            [
                f"--scenario={name}: no such scenario; there are {', '.join(NAMES[1:])}; correct it"
                for name in unknown
            ],
            "drill",
        )
    quiet_third_parties()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: no command is left running
    if _is_absent(config):
        given = load_config(ALONE, [*([config] if config else []), *(overrides or ())])
    else:
        given = load_config(config or "", overrides or ())
    report = drills.run(given, scenario or (), keep, typer.echo)
    typer.echo(drills.describe(report))
    if json_out is not None:
        Path(json_out).write_text(drills.as_json(report))
    if not report.held:
        raise typer.Exit(1)


def _is_absent(config: str | None) -> bool:
    """Tell whether there is no config, what stands in its place being the first override."""
    return config is None or ("=" in config and not config.endswith((".yaml", ".yml")))


def selftest(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help=(
                "YAML file (path or URL) of a run: its cluster, storage and zero sections are used. None: a worker "
                "for each GPU of this machine (without GPUs: two on its CPU), ./runs."
            ),
        ),
    ] = None,
    overrides: Overrides = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one: parity, collective, resume or throughput; may be given several times."
        ),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the selftest's folder though all held.")
    ] = False,
    out: Annotated[str, typer.Option(help="Local folder for selftest.json and selftest.md.")] = ".",
) -> None:
    """See in a few minutes whether dist_ft keeps its promises on your GPUs, and write a report to send back.

    A small model is trained in one process and by ZeRO-1, 2 and 3 on all workers (the same losses?), with a worker
    killed and with another number of workers (does it go on?); sums over all workers and pairs of nodes are checked and
    timed; a larger model says how fast training is. Works in a new folder below run.storage, removed if all
    held. The report holds versions, devices, figures and verdicts, no names of nodes. Exits 1 if something failed.

    \b
    Examples:
      dist-ft selftest --out report/
      dist-ft selftest configs/llama-8b.yaml --check parity --check collective

    Next: dist-ft drill CONFIG disturbs runs on that cluster and storage in more ways.
    """
    import signal
    from pathlib import Path

    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.selftest import selftest as selftests
    from dist_ft.selftest.checks import CHECKS
    from dist_ft.selftest.report import to_markdown

    unknown = [name for name in check or () if name not in CHECKS]
    if unknown:
        raise ConfigError(
            [
                f"--check={name}: no such check; there are {', '.join(CHECKS)}; correct it"
                for name in unknown
            ],
            "selftest",
        )
    quiet_third_parties()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # as Ctrl-C: no command is left running
    if _is_absent(config):
        given = selftests.detect(ALONE, [*([config] if config else []), *(overrides or ())])
    else:
        given = load_config(config or "", overrides or ())
    report = selftests.run(given, check or (), keep, typer.echo)
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selftest.json").write_text(selftests.as_json(report), "utf-8")
    (folder / "selftest.md").write_text(to_markdown(report), "utf-8")
    typer.echo(selftests.describe(report))
    typer.echo(f"wrote selftest.json and selftest.md in {out}; they are the report to send back")
    if not report.held:
        raise typer.Exit(1)
