"""The commands `dist-ft data inspect | import | split | pseudo | preview | pack-stats | ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_ft.cli.arguments import Config, Overrides, Run, named_run

if TYPE_CHECKING:
    from dist_ft.core.errors import DataError
    from dist_ft.data.sources.discovery import Row

HELP = (
    "Inspect and rewrite data, and verify what a run has read.\n\n\b\nFirst steps:\n"
    "  dist-ft data inspect mine/*.jsonl         columns, counts, suspicious rows\n"
    "  dist-ft data preview configs/single.yaml  which tokens are targets\n"
    "  dist-ft data verify runs/mine             was every sample read exactly once?"
)


def commands(register: Callable[..., Any]) -> None:
    """Pass every command to `register`, which takes (function) or (function, name)."""
    for command in (inspect, split, pseudo, preview, pack_stats, write, verify):
        register(command)

    # `import` is a keyword of Python, so the function has another name.
    register(import_, "import")


def inspect(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="Files, folders, globs, URLs or Hugging Face data sets."
        ),
    ],
) -> None:
    """Describe a data set: columns, counts, lengths, duplicates, suspicious rows.

    Reads every row once and writes nothing. Rows that cannot be decoded are counted, not refused.

    \b
    Examples:
      dist-ft data inspect mine.jsonl
      dist-ft data inspect "s3://bucket/shards/*.parquet" more.csv

    Next: dist-ft data preview CONFIG shows samples as training will see them.
    """
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.data.tools import inspection

    quiet_third_parties()
    typer.echo(inspection.format_inspection(inspection.inspect_paths(paths)))


def import_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="conll (one word and its tag on each line), squad, labelled (text files as "
            "PATH=LABEL), parallel (sources, targets), pairs (JSON lists of [text, label]).",
        ),
    ],
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files or URLs.")],
    out: Annotated[str, typer.Option(help="JSON Lines file to write (path or URL).")],
    encoding: Annotated[str, typer.Option(help="Encoding of the files.")] = "utf-8",
    part: Annotated[str | None, typer.Option(help="pairs: which of several lists.")] = None,
) -> None:
    """Convert files of a well-known format to JSON Lines for training.

    \b
    Examples:
      dist-ft data import conll train.conll --out train.jsonl
      dist-ft data import labelled reviews.pos=positive reviews.neg=negative --out reviews.jsonl

    Next: dist-ft data split FILE --out DIR, or set data.train to the file.
    """
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.data.tools.importers import IMPORTERS

    if kind not in IMPORTERS:
        raise ConfigError(
            [f"KIND={kind}: unknown format. Allowed: {', '.join(IMPORTERS)}. Use one of these."],
            "data import",
        )

    quiet_third_parties()

    # All rows before the first is written: a mistake in the last file leaves no half of a data set.
    rows = list(IMPORTERS[kind](paths, encoding, part))
    _write_rows(rows, out)
    typer.echo(f"{len(rows):,} rows in {out}; next: dist-ft data inspect {out}")


def split(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, globs or URLs.")
    ],
    out: Annotated[str, typer.Option(help="Folder or URL in which NAME.jsonl is written.")],
    share: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SHARE of a split, in order. Default: train=0.9 and held-out=0.1."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Column to stratify by, such as label."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(help="Column whose rows of one value stay together (articles, users)."),
    ] = None,
    per_label: Annotated[
        int,
        typer.Option(min=0, help="Rows of each value of --by to keep in the first split. 0: all."),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
) -> None:
    """Split rows into named sets by seed, stratified by a column or with few examples per label.

    \b
    Examples:
      dist-ft data split all.jsonl --out sets/ --by label
      dist-ft data split all.jsonl --out few/ --share train=0.8 --share held-out=0.2 \\
        --by label --per-label 8

    Next: set data.train and evaluation.data to the files.
    """
    from dist_ft.core.errors import ConfigError, DataError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.data.tools import splitting

    quiet_third_parties()
    shares = _parse_shares(share or ("train=0.9", "held-out=0.1"))

    if by is not None and group is not None:
        raise ConfigError(
            [
                f"--group={group}: cannot be combined with --by={by}, as groups would break the "
                "shares. Use one of them."
            ],
            "data split",
        )
    if per_label and by is None:
        raise ConfigError([f"--per-label={per_label}: needs a column. Set --by."], "data split")

    # Rows that cannot be decoded come as errors, for commands that count them. A split without them
    # would silently be a split of other data.
    rows: list[Any] = []
    for row in _read_rows(paths):
        if isinstance(row, DataError):
            raise row
        rows.append(row)

    # Sampled after the split, so that the held-out rows are the same for any number per label.
    splits = splitting.split_rows(rows, shares, seed, by, group)
    if per_label:
        first = next(iter(splits))
        splits[first] = splitting.sample_per_label(splits[first], per_label, seed, by or "")

    for name, members in splits.items():
        path = f"{out.rstrip('/')}/{name}.jsonl"
        _write_rows(members, path)
        typer.echo(f"{len(members):>8,} rows in {path}")


def pseudo(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a trained classifier, or of a run.")
    ],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, globs or URLs.")
    ],
    out: Annotated[str, typer.Option(help="JSON Lines file to write (path or URL).")],
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Lowest probability of a label that is accepted.")
    ] = 0.9,
    max_per_label: Annotated[
        int, typer.Option(min=0, help="Maximum rows per label, most confident first. 0: all.")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 32,
) -> None:
    """Label rows without a label by a trained classifier where it is confident (pseudo-labels).

    Reports how many rows it was not confident about.

    \b
    Examples:
      dist-ft data pseudo out/ unlabelled.jsonl --out pseudo.jsonl --confidence 0.95
      dist-ft data pseudo runs/intents "s3://bucket/rows/*.parquet" --out pseudo.jsonl

    Next: add it to data.train: [{path: train.jsonl}, {path: pseudo.jsonl, repeat: 0.5}]
    """
    from dist_ft.core.errors import DataError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.inference.model_folder import PredictionOptions
    from dist_ft.inference.predict import Predictor
    from dist_ft.inference.pseudo_labels import describe, pseudo_label

    quiet_third_parties()
    # Before the model is loaded, which takes a while: a wrong path is found at once.
    rows = _read_rows(paths)
    predictor = Predictor(model, PredictionOptions(batch_size=batch))
    result = pseudo_label(predictor, rows, confidence, max_per_label)

    if not result.rows:
        raise DataError(
            f"--confidence={confidence}: the model is not that confident about any of "
            f"{result.num_unsure:,} rows ({result.num_labeled:,} more had a label). "
            "Lower it, or train the model longer."
        )

    _write_rows(result.rows, out)
    typer.echo(describe(result, out))


def preview(
    config: Config,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of samples to show.")] = 3,
) -> None:
    """Show samples as training will see them, with target tokens marked, and length statistics.

    Tokenizes the training data once; the run reuses it. The marked text, in color or in [[ ]], is
    exactly what the loss counts. Look here first if a model trains on the wrong text.

    \b
    Examples:
      dist-ft data preview configs/single.yaml
      dist-ft data preview configs/single.yaml data.train=mine.jsonl --samples 5

    Next: dist-ft train CONFIG
    """
    from dist_ft import api
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()

    # Colors in a file or a pipe would be control characters; [[ ]] can be searched for.
    on_terminal = sys.stdout.isatty()
    text = api.preview(load_config(config, overrides or ()), samples, markup=on_terminal)
    if on_terminal:
        from rich.console import Console

        # Without rich's own highlighting, which would color numbers like targets.
        Console(highlight=False).print(text)
    else:
        typer.echo(text)


def pack_stats(config: Config, overrides: Overrides = None) -> None:
    """Report how full sequences are, packed and not, at this sequence length and around it.

    \b
    Examples:
      dist-ft data pack-stats configs/single.yaml
      dist-ft data pack-stats configs/llama-8b.yaml batch.sequence_length=8192

    Next: set batch.sequence_length and data.block_mib, then dist-ft train CONFIG
    """
    from dist_ft import api
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    typer.echo(api.pack_stats(load_config(config, overrides or ())))


def write(
    config: Config,
    out: Annotated[str, typer.Option(help="Folder or URL for the shards.")],
    overrides: Overrides = None,
    format: Annotated[str, typer.Option(help="parquet or jsonl.")] = "parquet",
    shard_mib: Annotated[
        float, typer.Option(min=0.001, help="Source data in a shard, in MiB.")
    ] = 64,
    tokenize: Annotated[
        bool,
        typer.Option(
            "--tokenize", help="Write tokens and targets by the config's tokenizer and template."
        ),
    ] = False,
) -> None:
    """Write a config's training data as new shards: other sizes or format, or pre-tokenized.

    Rows keep their order. If interrupted, the same command resumes.

    \b
    Examples:
      dist-ft data write configs/single.yaml --out s3://bucket/shards/ --shard-mib 128
      dist-ft data write configs/llama-8b.yaml --out s3://bucket/tokens/ --tokenize

    Next: set data.train to the folder (pre-tokenized shards are recognized by their columns).
    """
    from dist_ft import api
    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties

    if format not in ("parquet", "jsonl"):
        raise ConfigError(
            [f"--format={format}: unknown format. Allowed: parquet, jsonl. Use one of these."],
            "data write",
        )

    quiet_third_parties()
    written = api.write_data(load_config(config, overrides or ()), out, format, shard_mib, tokenize)
    typer.echo(
        f"{written.num_shards} shards in {out}, {written.num_written} of them written now; "
        f"next: set data.train={out}"
    )


def verify(
    run: Run,
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Place of the run's data (a bucket, a host, a hub name) that may be read, if RUN "
            "is a folder in another place. Repeatable.",
        ),
    ] = None,
) -> None:
    """Prove from its ledger that a run consumed every sample once an epoch, over all attempts.

    Also compares the shards with those the run started from. Exits 1 if a sample was lost or
    repeated. A folder does not decide where requests go: its storage options are not applied.

    \b
    Examples:
      dist-ft data verify runs/mine
      dist-ft data verify s3://bucket/runs/mine --data s3://corpus

    Next: nothing to do if the answer is yes.
    """
    from dist_ft.core.logs import redact
    from dist_ft.runs import ledger_audit

    url, places = named_run(run, overrides)
    audit = ledger_audit.audit(url)

    typer.echo(redact(ledger_audit.describe(audit)))
    if not audit.is_sound:
        raise typer.Exit(1)

    # Last, as it lists all of the data: the ledger only proves something if its data is unchanged.
    num_shards = ledger_audit.verify_shards(url, (*places, *(data or ())))
    typer.echo(f"shards unchanged since the run started: all {num_shards}")


def _parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """Return {name: share} of NAME=SHARE texts."""
    from dist_ft.core.errors import ConfigError

    shares = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            shares[name] = float(value)
        except ValueError:
            raise ConfigError(
                [f"--share={text}: not of the form NAME=SHARE. Write for instance train=0.8."],
                "data split",
            ) from None
    return shares


def _read_rows(paths: Sequence[str]) -> Iterator[Row | DataError]:
    """Return the rows of files, folders, globs or URLs, in order.

    Paths are resolved at once, rows are read as they are needed.
    """
    from dist_ft.config.schema import Source
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import discover_shards

    # Not a generator function: its body, and so a wrong path, would wait for the first row.
    found = discover_shards([Source(path=path) for path in paths], "PATH")
    return (row for shards in found for shard in shards for row in readers.iter_rows(shard))


def _write_rows(rows: list[Any], out: str) -> None:
    from dist_ft.core.errors import DataError
    from dist_ft.data.tools.write import encode_jsonl
    from dist_ft.storage.single_files import write_file

    if not rows:
        raise DataError(f"{out}: no rows to write. At least one is needed. Check the source.")

    write_file(out, encode_jsonl(rows))
