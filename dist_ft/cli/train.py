"""The commands `dist-ft train | check`."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Config, Overrides

SkipCheck = Annotated[
    bool,
    typer.Option(
        "--skip-check",
        help="Start without the probes of `check` (if only the workers can reach model and data).",
    ),
]


def train(config: Config, overrides: Overrides = None, skip_check: SkipCheck = False) -> None:
    """Run a fine-tuning to its end, or resume one that was interrupted.

    The same run.name under the same run.storage is the same run: it resumes from its latest
    checkpoint, on any number of workers. cluster.workers=0 trains in this process; 1 or more
    trains on Ray workers with DeepSpeed.

    \b
    Examples:
      dist-ft train configs/single.yaml
      dist-ft train configs/llama-8b.yaml run.name=mine cluster.workers=4..16

    Next: dist-ft export CONFIG --out DIR, which writes a Hugging Face folder.
    """
    from dist_ft import api
    from dist_ft.config.load import load_config

    api.train(load_config(config, overrides or ()), skip_check=skip_check)


def check(config: Config, overrides: Overrides = None) -> None:
    """Report everything that is wrong with a run, all at once, before a GPU is taken.

    Checks the config, model, tokenizer, data, storage, an earlier run of the same name, and this
    machine. Exits 2 and lists every problem with its remedy, or prints the batch arithmetic and ok.

    \b
    Examples:
      dist-ft check configs/llama-8b.yaml
      dist-ft check configs/llama-70b.yaml data.train=s3://bucket/shards/ cluster.workers=64

    Next: dist-ft preview CONFIG shows the target tokens.
    """
    from dist_ft.config.load import inspect_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.planning.batch import batch_arithmetic
    from dist_ft.runtime.preflight import check_run, limit_estimate

    quiet_third_parties()
    # Also with problems in the config: the user gets those of model, data and machine at once.
    run, problems, source = inspect_config(config, overrides or ())
    problems = problems + check_run.check(run, is_complete=not problems)
    if problems:
        raise ConfigError(problems, source)

    for name, arithmetic in batch_arithmetic(run):
        output.echo(f"{name:<14}{arithmetic}")
    for line in limit_estimate.limit_lines(run):
        output.echo(f"{'limits':<14}{line}")
    output.echo("ok")
