"""The command `dist-ft plan`: what a run will need, before a GPU is taken."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Config, Overrides


def plan(
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Only this kind: H100, A100-80GB, L40S, ... Default: a table of all known kinds."
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Number of workers, one GPU each. Default: cluster.workers."),
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(
            "--model-config",
            help="A config.json that replaces that of model.path (see configs/architectures).",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all figures as JSON, in bytes.")
    ] = False,
) -> None:
    """Report what a run needs: memory by kind and ZeRO stage, traffic, checkpoints, which GPUs.

    Needs no GPU and no weights: the model's config.json is enough. The model's own code is traced
    without values, so packing, the chunked loss, activation checkpointing and adapters count as
    they are. Model state is that of the ZeRO paper.

    \b
    Examples:
      dist-ft plan configs/llama-8b.yaml --gpu H100
      dist-ft plan configs/llama-70b.yaml --gpus 32 \\
        --model-config configs/architectures/llama-3.1-70b.json

    Next: dist-ft check CONFIG reports what else would stop the run.
    """
    import json

    from dist_ft.config.load import load_config
    from dist_ft.runtime.preflight import plan_report, run_plan

    resources = run_plan.plan(
        load_config(config, overrides or ()), model_config=model_config, gpu=gpu, num_gpus=gpus
    )

    # JSON has bytes, for programs; the text has rounded GiB.
    if as_json:
        output.echo_json(json.dumps(resources, indent=2))
    else:
        output.echo(plan_report.as_text(resources))
