"""The commands `dist-ft stages | tune`: runs made of runs."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Config, Overrides
from dist_ft.cli.train import SkipCheck


def tune(
    config: Config,
    search: Annotated[str, typer.Argument(metavar="SEARCH", help="YAML file of the search.")],
    overrides: Overrides = None,
) -> None:
    """Search over fields of a config, one run for each trial, and report the best values.

    Grid, random or Optuna search with early stopping of weak trials (ASHA), by Ray Tune. Trials
    are compared by checkpoint.best_by of their evaluations. If interrupted, the same command
    resumes.

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
    # The report is printed at the end; meanwhile each trial has its lines of progress.
    report = api.tune(config, search, overrides or (), report_line=typer.echo)
    output.echo(as_text(report))
    output.echo(f"wrote search.json, search.md and search.png in {report['url']}")


def stages(
    file: Annotated[
        str, typer.Argument(metavar="STAGES", help="YAML file of the stages (path or URL).")
    ],
    overrides: Overrides = None,
    skip_check: SkipCheck = False,
) -> None:
    """Fine-tune one model on several data sets in turn, and report how much of each it retains.

    Each stage is an ordinary run, <name>-<stage>, that starts from the result of the stage before.
    It may replay a share of earlier data; labels that are new to the head are added to it. After
    each stage the held-out data of every stage is scored. If interrupted, the same command resumes;
    completed stages are not run again.

    \b
    Examples:
      dist-ft stages configs/recipes/stages-intents.yaml
      dist-ft stages mine.yaml cluster.workers=2 run.storage=s3://bucket/runs

    Next: dist-ft export RUN --out DIR with the run of the last stage.
    """
    from dist_ft import api
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    report = api.stages(file, overrides or (), skip_check=skip_check, report_line=typer.echo)
    output.echo(f"wrote matrix.json, matrix.md and matrix.png in {report['url']}")
