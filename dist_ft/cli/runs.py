"""The commands `dist-ft runs list | show | watch | report | verify | diff | prune`; `cli` hangs them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli.data import Overrides, Run, url_of

HELP = (
    "Look at what runs have left in storage, check it, and clear away.\n\n\b\nFirst steps:\n"
    "  dist-ft runs list runs/           which runs are there?\n"
    "  dist-ft runs show runs/mine       how often was it started, what is committed?\n"
    "  dist-ft runs verify runs/mine     is every checkpoint still what was written?"
)


def commands(register: Callable[..., Any]) -> None:
    """Hand every command to `register`, which takes (function) or (function, name)."""
    register(list_runs, "list")
    for command in (show, watch, report, verify, diff, prune):
        register(command)


def list_runs(
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE", help="Folder or URL that run.storage names.")
    ],
) -> None:
    """Name the runs in a storage folder: newest step, checkpoints, attempts.

    \b
    Examples:
      dist-ft runs list runs/
      dist-ft runs list s3://bucket/runs

    Next: dist-ft runs show STORAGE/NAME
    """
    from dist_ft.runs import catalog

    typer.echo(catalog.describe_all(storage))


def show(run: Run, overrides: Overrides = None) -> None:
    """Tell how often a run was started, with how many workers, where it hung, and what is committed.

    \b
    Examples:
      dist-ft runs show runs/mine
      dist-ft runs show configs/llama-8b.yaml run.name=mine

    Next: dist-ft runs verify RUN
    """
    from dist_ft.runs import catalog

    typer.echo(catalog.describe(url_of(run, overrides)))


def watch(
    run: Run,
    overrides: Overrides = None,
    once: Annotated[bool, typer.Option("--once", help="Tell what there is and leave.")] = False,
) -> None:
    """Follow a run's metrics from anywhere that reaches its storage, until it ends.

    \b
    Examples:
      dist-ft runs watch runs/mine
      dist-ft runs watch s3://bucket/runs/mine --once

    Next: dist-ft runs show RUN
    """
    from dist_ft.runs import watch_run
    from dist_ft.training.console import Console

    typer.echo(watch_run.watch(url_of(run, overrides), once, Console().say))


def report(
    run: Run,
    out: Annotated[
        str, typer.Option(help="Local folder for report.html, report.md and report.json.")
    ],
    overrides: Overrides = None,
    attributions: Annotated[
        bool,
        typer.Option(
            "--attributions",
            help=("Ask the model again which tokens spoke for its errors (integrated gradients)."),
        ),
    ] = False,
) -> None:
    """Write a run's report: curves, metrics before and after, tables, errors, what was run. One page, nothing loaded.

    \b
    Examples:
      dist-ft runs report runs/mine --out report/
      dist-ft runs report configs/recipes/entities.yaml --out report/ --attributions

    Next: open report/report.html
    """
    import json
    from pathlib import Path

    from dist_ft.runs import report as reports

    url = url_of(run, overrides)
    found = reports.gather(url)
    if attributions and found["examples"]:
        from dist_ft.core.logs import quiet_third_parties
        from dist_ft.inference.attributions import attribute
        from dist_ft.storage.filesystem import Store

        quiet_third_parties()
        found["attributions"] = attribute(Store(url), found["examples"], found["examples_step"])
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("html", reports.to_html(found)),
        ("md", reports.to_markdown(found)),
        ("json", json.dumps(found, indent=1, ensure_ascii=False)),
    ):
        (folder / f"report.{name}").write_text(text, "utf-8")
    typer.echo(f"wrote report.html, report.md and report.json in {out}")


def verify(run: Run, overrides: Overrides = None) -> None:
    """Read every checkpoint of a run whole and hold it against its manifest's checksums. Exits 1 if one differs.

    \b
    Examples:
      dist-ft runs verify runs/mine
      dist-ft runs verify configs/llama-8b.yaml run.name=mine

    Next: dist-ft data verify RUN proves that no sample was lost or repeated.
    """
    from dist_ft.core.logs import redact
    from dist_ft.runs import catalog

    damaged = False
    for name, problem in catalog.verify(url_of(run, overrides)):
        damaged |= bool(problem)
        typer.echo(redact(f"{name}: {problem or 'sound'}"))
    if damaged:
        raise typer.Exit(1)


def diff(
    run: Run,
    step: Annotated[list[int], typer.Option(help="A committed step; give it twice.")],
    overrides: Overrides = None,
) -> None:
    """Tell how far each weight moved between two committed steps.

    \b
    Examples:
      dist-ft runs diff runs/mine --step 500 --step 1000
      dist-ft runs diff s3://bucket/runs/mine --step 1000 --step 2000

    Next: dist-ft export RUN --out DIR --step STEP
    """
    from dist_ft.core.errors import ConfigError
    from dist_ft.runs import catalog

    if len(step) != 2:
        raise ConfigError(
            [f"--step: {len(step)} given; two steps are compared; write --step A --step B"],
            "runs diff",
        )
    typer.echo(catalog.diff(url_of(run, overrides), *step))


def prune(
    run: Run,
    overrides: Overrides = None,
    keep_last: Annotated[int, typer.Option(min=1, help="Newest checkpoints kept.")] = 1,
    keep_every_steps: Annotated[
        int, typer.Option(min=0, help="Besides, those at multiples; 0: none.")
    ] = 0,
    keep_best: Annotated[
        int, typer.Option(min=0, help="Besides, those of lowest held-out loss; 0: none.")
    ] = 0,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove; without it they are only named.")
    ] = False,
) -> None:
    """Remove checkpoints of a run that is over (a running one keeps its own house). The newest sound one stays.

    \b
    Examples:
      dist-ft runs prune runs/mine                     what would go?
      dist-ft runs prune runs/mine --keep-last 2 --yes

    Next: dist-ft runs show RUN
    """
    from dist_ft.config.schema import CheckpointSection
    from dist_ft.runs import catalog

    section = CheckpointSection(
        keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best
    )
    gone = catalog.prune(url_of(run, overrides), section, yes)
    for name in gone:
        typer.echo(f"{'removed' if yes else 'would be removed'}: {name}")
    typer.echo(
        f"{len(gone)} checkpoint{'s' if len(gone) != 1 else ''}"
        + ("" if yes or not gone else "; add --yes")
    )
