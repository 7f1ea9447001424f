"""The commands `dist-ft stages | tune`: runs made of runs; `cli` hangs them in."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli.data import Config, Overrides


def tune(
    config: Config,
    search: Annotated[str, typer.Argument(metavar="SEARCH", help="YAML file of the search.")],
    overrides: Overrides = None,
) -> None:
    """Try values of a config's fields, each trial a run of its own, and tell which are best.

    By grid, random draw or Optuna, with early stopping of trials that fall behind (ASHA), through Ray Tune. Trials are
    compared by checkpoint.best_by of their evaluations. Cut off, the same command goes on.

    \b
    Examples:
      dist-ft tune configs/recipes/intents.yaml configs/recipes/search.yaml
      dist-ft tune mine.yaml search.yaml schedule.epochs=2 run.storage=s3://bucket/runs

    Next: dist-ft export RUN --out DIR --best with the run of the best trial.
    """
    from dist_ft import api
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.workflows.search_report import as_text

    quiet_third_parties()
    report = api.tune(config, search, overrides or (), say=typer.echo)
    typer.echo(as_text(report))
    typer.echo(f"kept in {report['url']}: search.json, search.md, search.png")


def stages(
    file: Annotated[
        str, typer.Argument(metavar="STAGES", help="YAML file of the stages (path or URL).")
    ],
    overrides: Overrides = None,
    skip_check: Annotated[
        bool, typer.Option("--skip-check", help="Start each run without the probes of `check`.")
    ] = False,
) -> None:
    """Fine-tune one model on one data set after the other, and tell how much of each it keeps.

    Each stage is an ordinary run, <name>-<stage>, that begins with the result of the one before; it may replay a share
    of older data; labels new to the head are added to it. After each stage every stage's held-out data is scored. Cut
    off, the same command goes on where it stopped; what is complete is not run again.

    \b
    Examples:
      dist-ft stages configs/recipes/stages-intents.yaml
      dist-ft stages mine.yaml cluster.workers=2 run.storage=s3://bucket/runs

    Next: dist-ft export RUN --out DIR with the run of the last stage.
    """
    from dist_ft import api
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    report = api.stages(file, overrides or (), skip_check=skip_check, say=typer.echo)
    typer.echo(f"kept in {report['url']}: matrix.json, matrix.md, matrix.png")
