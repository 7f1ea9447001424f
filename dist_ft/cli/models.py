"""The commands `dist-ft evaluate | predict | decode`: models as they are, without training; `cli` hangs them in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dist_ft.cli.data import Config, Overrides

HOW = {
    "random": " (random head)",
    "likelihood": " (prompted)",
    "generation": " (written)",
    "prototypes": " (prototypes)",
}
"""What the table says of a model that has no trained head."""
Strategy = Annotated[
    str,
    typer.Option(
        help=(
            "How texts are made: greedy, beam:4 (beams) or sample:0.7 (temperature), with further fields of "
            "evaluation.decoding as in beam:4,length_penalty=0.8 or sample:0.7,top_p=0.9,num_samples=3,seed=1."
        )
    ),
]


def evaluate(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder, URL or hub name to score; several: side by side; none: model.path."
        ),
    ] = None,
    random_head: Annotated[
        bool,
        typer.Option("--random-head", help="Score a head that was never trained too, labelled so."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="All metrics, tables by label too, as JSON.")
    ] = False,
) -> None:
    """Score models on a config's held-out data, without training: the metrics of its task.

    \b
    Examples:
      dist-ft evaluate configs/recipes/reviews.yaml --model out/
      dist-ft evaluate configs/recipes/zero-shot.yaml --model BASE_MODEL --model out/

    Next: dist-ft predict MODEL FILE --out FILE says what a model answers to each row.
    """
    from dist_ft.config.load import load_config
    from dist_ft.config.sections.task import METRICS
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.inference.evaluate import evaluate_models
    from dist_ft.training.console import table

    quiet_third_parties()
    run = load_config(config, overrides or ())
    found = evaluate_models(run, model or [run.model.path], random_head)
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found, indent=1, ensure_ascii=False))
        return
    names = [
        name
        for values in found.values()
        for name, value in values.items()
        if isinstance(value, float | int)
    ]
    rows = [
        [name.replace("_", " "), *(_number(values.get(name)) for values in found.values())]
        for name in dict.fromkeys(names)
    ]
    heads = ["", *(path + HOW.get(values["head"], "") for path, values in found.items())]
    on = ", ".join(source.path for source in run.evaluation.data)
    typer.echo(table(f"{run.task.name.replace('_', ' ')} on {on}", rows, heads))
    for path, values in found.items():
        if "by_template" in values:
            typer.echo(_by_template(path, values["by_template"], METRICS[run.task.name]))


def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, such as `export` wrote.")
    ],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, globs or URLs.")
    ],
    out: Annotated[
        str,
        typer.Option(
            help=(
                "To write, or to go on with: a local file (.jsonl), or a folder or URL for shards."
            )
        ),
    ],
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Ray workers, each with the model, writing shards; 0: this process."
        ),
    ] = 0,
    form: Annotated[str, typer.Option("--format", help="Of shards: jsonl or parquet.")] = "jsonl",
    batch: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest text to make, in tokens.")
    ] = 128,
    strategy: Strategy = "greedy",
) -> None:
    """Let a model say what it finds in each row: a label, tags, an answer, a number, a vector or a text.

    Rows keep their order and their columns and get one more, `prediction`. Read are `text` (and `pair`), `tokens`,
    `question` and `context`, `source`, or `prompt`, by what the model does. Cut off, the same command goes on.
    A folder holds a shard for each 2 MiB or so of input, the same for any number of workers.

    \b
    Examples:
      dist-ft predict out/ new.jsonl --out said.jsonl
      dist-ft predict out/ "s3://bucket/rows/*.parquet" --out s3://bucket/said --format parquet --workers 8

    Next: dist-ft data inspect said.jsonl
    """
    from dist_ft import api
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    shards, rows = api.predict(
        model,
        paths,
        out,
        workers=workers,
        form=form,
        batch=batch,
        max_new_tokens=max_new_tokens,
        strategy=strategy,
    )
    typer.echo(
        f"{rows:,} rows in {out}"
        if out.endswith(".jsonl")
        else f"{shards:,} shards in {out}; {rows:,} rows written now"
    )


def decode(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder, URL or hub name; several: side by side; none: model.path."
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="A way to make texts, as of `generate`; several are compared; none: that of evaluation.decoding."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON, with the first texts.")] = False,
) -> None:
    """Compare ways to make texts: evaluation.text_metrics on held-out prompts, seconds, tokens a second.

    Prompts, lengths and metrics are those of the section evaluation; evaluation.decoding.max_new_tokens must be set.

    \b
    Examples:
      dist-ft decode configs/recipes/translation.yaml --strategy greedy --strategy beam:4 --strategy sample:0.7
      dist-ft decode configs/recipes/math.yaml evaluation.generate_samples=50 --model BASE_MODEL --model out/

    Next: set the best as evaluation.decoding, or give it to dist-ft predict MODEL FILE --strategy ...
    """
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.inference.compare_decoding import compare
    from dist_ft.training.console import table

    quiet_third_parties()
    run = load_config(config, overrides or ())
    found = compare(run, model or [run.model.path], strategy or [])
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found, indent=1, ensure_ascii=False))
        return
    names = [name for name, value in found[0].items() if isinstance(value, float | int)]
    rows = [
        [one["strategy"], one["model"], *(_number(one[name]) for name in names)] for one in found
    ]
    heads = ["", "model", *(name.replace("_", " ") for name in names)]
    on = ", ".join(source.path for source in run.evaluation.data)
    typer.echo(table(f"texts on {on}", rows, heads))


def before_after(title: str, measured: dict[str, tuple[float, float]]) -> str:
    """Return {measure: (before, after)} as a table."""
    from dist_ft.training.console import table

    rows = [
        [name.replace("_", " "), _number(before), _number(after)]
        for name, (before, after) in measured.items()
    ]
    return table(title, rows, ["", "before", "after"])


def _by_template(path: str, found: dict[str, dict[str, Any]], metrics: tuple[str, ...]) -> str:
    """Return a table of what a model told by each template."""
    from dist_ft.training.console import table

    rows = [
        [name.replace("_", " "), *(_number(values.get(name)) for values in found.values())]
        for name in metrics
    ]
    return table(
        f"{path} by template", rows, ["", *(template.replace("\n", "\\n") for template in found)]
    )


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:.4f}"
