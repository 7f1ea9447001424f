"""The command `dist-ft export`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Overrides, Run, is_config_file, run_url

DTYPES = ("bfloat16", "float32")


def export(
    run: Run,
    out: Annotated[str, typer.Option(help="Local folder to write.")],
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the checkpoint. Default: the latest.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The best checkpoint by checkpoint.best_by.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the exported weights: bfloat16 or float32. Default: as trained."
        ),
    ] = None,
    average: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema",
            help="Export the moving average of the weights. Default: as evaluation.weights says.",
        ),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            help="Export the LoRA or IA3 adapter alone, for peft. Default: merge it.",
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="8-bit weights (torchao). Reports size, latency and scores before/after."
        ),
    ] = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder with tokenizer, chat template and model card.

    The folder is loaded again with plain transformers and its logits are compared before the
    command reports success.

    \b
    Examples:
      dist-ft export configs/llama-8b.yaml --out llama-mine/ --dtype bfloat16
      dist-ft export s3://bucket/runs/mine --out mine-at-500/ --step 500

    Next: dist-ft generate DIR --prompt "..."
    """
    from dist_ft import api
    from dist_ft.cli.tables import before_after
    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties

    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            [f"--dtype={dtype}: unknown type. Allowed: {', '.join(DTYPES)}. Use one of these."],
            "export",
        )
    if best and step is not None:
        raise ConfigError(
            [f"--step={step}: cannot be combined with --best. Use one of them."], "export"
        )

    quiet_third_parties()

    # A config also brings the options of its storage; for a folder they are overridden.
    source: Any = run_url(run, overrides)
    if is_config_file(run):
        source = load_config(run, overrides or ())
    changes = api.export(
        source,
        out,
        step=step,
        dtype=dtype,
        adapter=adapter,
        best=best,
        int8=int8,
        average=average,
    )
    if changes:
        output.echo(before_after("int8 weights", changes))

    # No other command takes an adapter alone.
    next_step = "" if adapter else f"; next: {api.next_step(out)}"
    output.echo(f"wrote {out}{next_step}")
