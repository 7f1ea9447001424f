"""The commands `dist-ft data inspect | import | split | pseudo | preview | pack-stats | write | verify`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file of the run (path or URL).")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...",
        help="Fields to set over the file, such as schedule.steps=100.",
    ),
]

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help=("Config of the run (.yaml), or the URL of its folder: <run.storage>/<run.name>."),
    ),
]

HELP = (
    "Look at data, write it anew, and prove what a run has read.\n\n\b\nFirst steps:\n"
    "  dist-ft data inspect mine/*.jsonl        what is in it, and what is odd?\n"
    "  dist-ft data preview configs/single.yaml what will be learned?\n"
    "  dist-ft data verify runs/mine            was every sample read just once?"
)


def commands(register: Callable[..., Any]) -> None:
    """Hand every command to `register`."""
    for command in (inspect, split, pseudo, preview, pack_stats, write, verify):
        register(command)
    register(import_, "import")


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Files, folders, globs, URLs or Hugging Face data sets."
        ),
    ],
) -> None:
    """Tell what lies in a data set: columns, counts, lengths, duplicates, suspicious rows.

    Reads every row once and writes nothing. Rows that can not be decoded are counted, not refused.

    \b
    Examples:
      dist-ft data inspect mine.jsonl
      dist-ft data inspect "s3://bucket/shards/*.parquet" more.csv

    Next: dist-ft data preview CONFIG shows samples as training will see them.
    """
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.data.tools import inspection

    quiet_third_parties()
    typer.echo(inspection.describe(inspection.inspect(paths)))


def import_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help=(
                "conll (a word and its tag a line), squad, labelled (files of texts as PATH=LABEL), parallel (sources, "
                "targets), pairs (JSON lists of [text, label])."
            ),
        ),
    ],
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files or URLs.")],
    out: Annotated[str, typer.Option(help="File of JSON lines to write (path or URL).")],
    encoding: Annotated[str, typer.Option(help="Of the files.")] = "utf-8",
    part: Annotated[str | None, typer.Option(help="pairs: which of several lists.")] = None,
) -> None:
    """Turn files of a well-known format into JSON lines that can be trained on.

    \b
    Examples:
      dist-ft data import conll train.conll --out train.jsonl
      dist-ft data import labelled reviews.pos=positive reviews.neg=negative --out reviews.jsonl --encoding latin-1

    Next: dist-ft data split FILE --out DIR, or name the file in data.train.
    """
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.data.tools.importers import IMPORTERS

    if kind not in IMPORTERS:
        raise ConfigError(
            [f"KIND={kind}: no such format; allowed: {', '.join(IMPORTERS)}; correct it"],
            "data import",
        )
    quiet_third_parties()
    rows = list(IMPORTERS[kind](paths, encoding, part))
    _write_rows(rows, out)
    typer.echo(f"{len(rows):,} rows in {out}; next: dist-ft data inspect {out}")


def split(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, globs or URLs.")
    ],
    out: Annotated[str, typer.Option(help="Folder or URL to write NAME.jsonl into.")],
    share: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SHARE of a split, in order (train=0.8); none: train=0.9 and held-out=0.1."
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Column whose values have the same shares in every split (such as label)."
        ),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Column of which rows of one value stay together (articles, users)."),
    ] = None,
    per_label: Annotated[
        int,
        typer.Option(
            min=0, help="Keep so many rows of each value of --by in the first split; 0: all."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Which rows go where.")] = 0,
) -> None:
    """Split rows into named sets by seed: stratified by a column, and with few examples a label where asked for.

    \b
    Examples:
      dist-ft data split all.jsonl --out sets/ --by label
      dist-ft data split all.jsonl --out few/ --share train=0.8 --share held-out=0.2 --by label --per-label 8

    Next: set data.train and evaluation.data to the files.
    """
    from dist_ft.config.schema import Source
    from dist_ft.core.errors import ConfigError, DataError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import resolve
    from dist_ft.data.tools import splitting

    quiet_third_parties()
    shares = {}
    for given in share or ("train=0.9", "held-out=0.1"):
        name, _, value = given.partition("=")
        try:
            shares[name] = float(value)
        except ValueError:
            raise ConfigError(
                [f"--share={given}: is no NAME=SHARE, such as train=0.8; correct it"], "data split"
            ) from None
    if by is not None and group is not None:
        raise ConfigError(
            [
                f"--group={group}: with --by={by} rows could not both stay together and keep shares; one of "
                "them is allowed; leave one out"
            ],
            "data split",
        )
    if per_label and by is None:
        raise ConfigError(
            [f"--per-label={per_label}: of which column is not said; set --by"], "data split"
        )
    rows: list[Any] = []
    for row in (
        row
        for shards in resolve([Source(path=path) for path in paths], "PATH")
        for shard in shards
        for row in readers.rows_of(shard)
    ):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    found = splitting.split(rows, shares, seed, by, group)
    if per_label:
        first = next(iter(found))
        found[first] = splitting.few(found[first], per_label, seed, by or "")
    for name, rows in found.items():
        _write_rows(rows, f"{out.rstrip('/')}/{name}.jsonl")
        typer.echo(f"{len(rows):>8,} rows in {out.rstrip('/')}/{name}.jsonl")


def pseudo(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a trained classifier, or a run's.")
    ],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, globs or URLs.")
    ],
    out: Annotated[str, typer.Option(help="File of JSON lines to write (path or URL).")],
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Least probability of a label that is taken.")
    ] = 0.9,
    most: Annotated[int, typer.Option(min=0, help="Most rows a label, the surest; 0: all.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
) -> None:
    """Let a trained classifier label rows that have no label, where it is sure enough; tell how many it was not.

    \b
    Examples:
      dist-ft data pseudo out/ unlabelled.jsonl --out pseudo.jsonl --confidence 0.95
      dist-ft data pseudo runs/intents "s3://bucket/rows/*.parquet" --out pseudo.jsonl --most 500

    Next: add it to data.train: [{path: train.jsonl}, {path: pseudo.jsonl, repeat: 0.5}]
    """
    from dist_ft.config.schema import Source
    from dist_ft.core.errors import DataError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import resolve
    from dist_ft.inference.predict import Predictor
    from dist_ft.inference.pseudo_labels import describe, pseudo_label

    quiet_third_parties()
    shards = [
        shard for found in resolve([Source(path=path) for path in paths], "PATH") for shard in found
    ]
    labelled = pseudo_label(
        Predictor(model, batch),
        (row for shard in shards for row in readers.rows_of(shard)),
        confidence,
        most,
    )
    if not labelled.rows:
        raise DataError(
            f"--confidence={confidence}: the model is as sure of none of {labelled.num_unsure:,} rows "
            f"({labelled.num_labelled:,} more had a label); a lower one may keep some; lower it, or train "
            "the model longer"
        )
    _write_rows(labelled.rows, out)
    typer.echo(describe(labelled, out))


def _write_rows(rows: list[Any], out: str) -> None:
    from dist_ft.core.errors import DataError
    from dist_ft.data.tools.write import as_jsonl
    from dist_ft.storage.filesystem import Store

    if not rows:
        raise DataError(
            f"{out}: there is no row to write; at least one is needed; check the source"
        )
    folder, _, name = out.rpartition("/")
    Store(folder or ".").write(name, as_jsonl(rows))


def preview(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="How many samples to show.")] = 3,
) -> None:
    """Show samples as training will see them, with what is learned marked, and the data's length statistics.

    Tokenises the training data once (the run reuses it). What is marked, in colour or [[ ]], is exactly what the loss
    counts: look here first if a model learns the wrong thing.

    \b
    Examples:
      dist-ft data preview configs/single.yaml
      dist-ft data preview configs/single.yaml data.train=mine.jsonl data.fields.prompt=question --samples 5

    Next: dist-ft train CONFIG
    """
    from dist_ft import api
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties

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
    from dist_ft import api
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    typer.echo(api.pack_stats(load_config(config, overrides or ())))


def write(
    config: Config,
    out: Annotated[str, typer.Option(help="Folder or URL to write the shards into.")],
    overrides: Overrides = None,
    format: Annotated[str, typer.Option(help="parquet or jsonl.")] = "parquet",
    shard_mib: Annotated[float, typer.Option(min=0.001, help="MiB of source data a shard.")] = 64,
    tokenise: Annotated[
        bool,
        typer.Option(
            "--tokenise",
            help="Write tokens and targets made by the config's tokenizer and template.",
        ),
    ] = False,
) -> None:
    """Write a config's training data as new shards: other sizes, another format, or tokens made ahead.

    Rows keep their order. Cut off, the same command goes on where it stopped.

    \b
    Examples:
      dist-ft data write configs/single.yaml --out s3://bucket/shards/ --shard-mib 128
      dist-ft data write configs/llama-8b.yaml --out s3://bucket/tokens/ --tokenise

    Next: set data.train to the folder (tokens are found by their columns).
    """
    from dist_ft import api
    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties

    if format not in ("parquet", "jsonl"):
        raise ConfigError(
            [f"--format={format}: no such choice; allowed: parquet, jsonl; correct it"],
            "data write",
        )
    quiet_third_parties()
    total, written = api.write_data(
        load_config(config, overrides or ()), out, format, shard_mib, tokenise
    )
    typer.echo(
        f"{total} shards in {out}, {written} of them written now; next: set data.train={out}"
    )


def verify(run: Run, overrides: Overrides = None) -> None:
    """Prove from its ledger that a run consumed every sample exactly once an epoch, over all its attempts.

    Also holds the shards as they lie now against those the run began with. Exits 1 if a sample was lost or repeated.

    \b
    Examples:
      dist-ft data verify runs/mine
      dist-ft data verify configs/llama-8b.yaml run.name=mine

    Next: nothing to do if it says yes.
    """
    from dist_ft.core.logs import redact
    from dist_ft.runs import ledger_audit

    run = url_of(run, overrides)
    found = ledger_audit.audit(run)
    typer.echo(redact(ledger_audit.describe(found)))
    if not found.is_sound:
        raise typer.Exit(1)
    typer.echo(f"shards unchanged since the run began: all {ledger_audit.verify_shards(run)}")


def url_of(run: str, overrides: list[str] | None) -> str:
    """Return the URL of a run given by its config or by its folder; storage is set up as the config says."""
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.storage import filesystem

    quiet_third_parties()
    if not run.endswith((".yaml", ".yml")):
        return run
    config = load_config(run, overrides or ())
    filesystem.configure(config.storage.options)
    return config.run_url
