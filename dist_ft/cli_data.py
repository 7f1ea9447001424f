"""The commands `dist-ft data inspect | preview | pack-stats | write | verify`; `cli` hangs them in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run (path or URL).")]
Overrides = Annotated[list[str] | None, typer.Argument(
    metavar="[SECTION.FIELD=VALUE]...", help="Fields to set over the file, such as schedule.steps=100.")]

Run = Annotated[str, typer.Argument(metavar="RUN", help=(
    "Config of the run (.yaml), or the URL of its folder: <run.storage>/<run.name>."))]

HELP = ("Look at data, write it anew, and prove what a run has read.\n\n\b\nFirst steps:\n"
        "  dist-ft data inspect mine/*.jsonl        what is in it, and what is odd?\n"
        "  dist-ft data preview configs/single.yaml what will be learned?\n"
        "  dist-ft data verify runs/mine            was every sample read just once?")


def commands(register: Callable[[Callable[..., None]], Any]) -> None:
    """Hand every command to `register`."""
    for command in (inspect, preview, pack_stats, write, verify):
        register(command)


def inspect(paths: Annotated[list[str], typer.Argument(
        metavar="PATH...", help="Files, folders, globs, URLs or Hugging Face data sets.")]) -> None:
    """Tell what lies in a data set: columns, counts, lengths, duplicates, suspicious rows.

    Reads every row once and writes nothing. Rows that can not be decoded are counted, not refused.

    \b
    Examples:
      dist-ft data inspect mine.jsonl
      dist-ft data inspect "s3://bucket/shards/*.parquet" more.csv

    Next: dist-ft data preview CONFIG shows samples as training will see them.
    """
    from dist_ft.data import inspection
    from dist_ft.logs import quiet_third_parties

    quiet_third_parties()
    typer.echo(inspection.describe(inspection.inspect(paths)))


def preview(config: Config, overrides: Overrides = None,
            samples: Annotated[int, typer.Option(min=1, help="How many samples to show.")] = 3) -> None:
    """Show samples as training will see them, with what is learned marked, and the data's length statistics.

    Tokenises the training data once (the run reuses it). What is marked, in colour or [[ ]], is exactly what the loss
    counts: look here first if a model learns the wrong thing.

    \b
    Examples:
      dist-ft data preview configs/single.yaml
      dist-ft data preview configs/single.yaml data.train=mine.jsonl data.fields.prompt=question --samples 5

    Next: dist-ft train CONFIG
    """
    from dist_ft import api, load_config
    from dist_ft.logs import quiet_third_parties

    quiet_third_parties()
    on_terminal = sys.stdout.isatty()
    text = api.preview(load_config(config, overrides or ()), samples, markup=on_terminal)
    if on_terminal:
        from rich.console import Console

        Console(highlight=False).print(text)
    else:
        typer.echo(text)


def pack_stats(config: Config, overrides: Overrides = None) -> None:
    """Tell how full sequences are, packed and not, for this sequence length and those around it.

    \b
    Examples:
      dist-ft data pack-stats configs/single.yaml
      dist-ft data pack-stats configs/llama-8b.yaml data.train=s3://bucket/shards/ batch.sequence_length=8192

    Next: set batch.sequence_length and data.block_mib, then dist-ft train CONFIG
    """
    from dist_ft import api, load_config
    from dist_ft.logs import quiet_third_parties

    quiet_third_parties()
    typer.echo(api.pack_stats(load_config(config, overrides or ())))


def write(config: Config, out: Annotated[str, typer.Option(help="Folder or URL to write the shards into.")],
          overrides: Overrides = None,
          format: Annotated[str, typer.Option(help="parquet or jsonl.")] = "parquet",
          shard_mib: Annotated[float, typer.Option(min=0.001, help="MiB of source data a shard.")] = 64,
          tokenise: Annotated[bool, typer.Option(
              "--tokenise", help="Write tokens and targets made by the config's tokenizer and template.")] = False
          ) -> None:
    """Write a config's training data as new shards: other sizes, another format, or tokens made ahead.

    Rows keep their order. Cut off, the same command goes on where it stopped.

    \b
    Examples:
      dist-ft data write configs/single.yaml --out s3://bucket/shards/ --shard-mib 128
      dist-ft data write configs/llama-8b.yaml --out s3://bucket/tokens/ --tokenise

    Next: set data.train to the folder (tokens are found by their columns).
    """
    from dist_ft import api, load_config
    from dist_ft.errors import ConfigError
    from dist_ft.logs import quiet_third_parties

    if format not in ("parquet", "jsonl"):
        raise ConfigError([f"--format={format}: no such choice; allowed: parquet, jsonl; correct it"], "data write")
    quiet_third_parties()
    total, written = api.write_data(load_config(config, overrides or ()), out, format, shard_mib, tokenise)
    typer.echo(f"{total} shards in {out}, {written} of them written now; next: set data.train={out}")


def verify(run: Run, overrides: Overrides = None) -> None:
    """Prove from its ledger that a run consumed every sample exactly once an epoch, over all its attempts.

    Also holds the shards as they lie now against those the run began with. Exits 1 if a sample was lost or repeated.

    \b
    Examples:
      dist-ft data verify runs/mine
      dist-ft data verify configs/llama-8b.yaml run.name=mine

    Next: nothing to do if it says yes.
    """
    from dist_ft.logs import redact
    from dist_ft.runtime import audit

    run = url_of(run, overrides)
    found = audit.audit(run)
    typer.echo(redact(audit.describe(found)))
    if not found.is_sound:
        raise typer.Exit(1)
    typer.echo(f"shards unchanged since the run began: all {audit.verify_shards(run)}")


def url_of(run: str, overrides: list[str] | None) -> str:
    """Return the URL of a run given by its config or by its folder; storage is set up as the config says."""
    from dist_ft import load_config, storage
    from dist_ft.logs import quiet_third_parties

    quiet_third_parties()
    if not run.endswith((".yaml", ".yml")):
        return run
    config = load_config(run, overrides or ())
    storage.configure(config.storage.options)
    return config.run_url
