"""The command `dist-ft plan`: what a run will need, before a GPU is taken; `cli` hangs it in."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli.data import Config, Overrides


def plan(
    config: Config,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help=(
                "Only this kind: H100, A100-80GB, L40S, ...; none: a table of all that are known."
            )
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="So many workers, a GPU each; none: cluster.workers.")
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(
            "--model-config",
            help="A config.json in place of model.path's (see configs/architectures).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON, in bytes.")] = False,
) -> None:
    """Tell what a run will need: memory by kind and ZeRO stage, bytes on the wire, checkpoints, which GPUs, how many.

    Needs no GPU and no weights: a model's config.json is enough. The model's own code is rehearsed without values, so
    packing, the chunked loss, checkpointing and adapters count as they are; model state is the ZeRO paper's.

    \b
    Examples:
      dist-ft plan configs/llama-8b.yaml --gpu H100
      dist-ft plan configs/llama-70b.yaml --model-config configs/architectures/llama-3.1-70b.json --gpus 32

    Next: dist-ft check CONFIG says what else would stop the run.
    """
    import json

    from dist_ft.config.load import load_config
    from dist_ft.runtime.preflight import plan_report, run_plan

    found = run_plan.plan(
        load_config(config, overrides or ()), model_config=model_config, gpu=gpu, num_gpus=gpus
    )
    typer.echo(json.dumps(found, indent=2) if as_json else plan_report.as_text(found))
