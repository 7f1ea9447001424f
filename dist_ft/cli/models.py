"""The commands `dist-ft generate | evaluate | predict | decode`: use models without training."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Config, Overrides, Strategy
from dist_ft.config.task_facts import task_class

HEAD_NOTES = {
    "random": " (random head)",
    "likelihood": " (prompted)",
    "generation": " (generated)",
    "prototypes": " (prototypes)",
}
"""How the table marks a model without a trained head."""


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, such as `export` writes.")
    ],
    prompt: Annotated[str, typer.Option(help="Prompt to answer.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of the answer, in tokens.")
    ] = 128,
    strategy: Strategy = "greedy",
) -> None:
    """Answer a prompt with a model folder, by plain transformers and its chat template if any.

    \b
    Examples:
      dist-ft generate out/ --prompt "What does os.path.join do?"
      dist-ft generate out/ --prompt "Why is the sky blue?" --strategy sample:0.7,top_p=0.9,seed=1

    Next: compare with the original model: dist-ft generate BASE_MODEL --prompt ...
    """
    from dist_ft import api
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    answer = api.generate(
        model, prompt, system=system, max_new_tokens=max_new_tokens, strategy=strategy
    )
    output.echo(answer)


def evaluate(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder, URL or hub name to score. Several are compared. "
            "Default: model.path."
        ),
    ] = None,
    random_head: Annotated[
        bool,
        typer.Option("--random-head", help="Also score a head that was never trained, marked so."),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print all metrics as JSON, with tables by label.")
    ] = False,
) -> None:
    """Score models on a config's held-out data with the metrics of its task, without training.

    \b
    Examples:
      dist-ft evaluate configs/recipes/reviews.yaml --model out/
      dist-ft evaluate configs/recipes/zero-shot.yaml --model BASE_MODEL --model out/

    Next: dist-ft predict MODEL FILE --out FILE writes a prediction for each row.
    """
    from dist_ft.cli import tables
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.inference.evaluate import evaluate_models
    from dist_ft.training.console import format_table

    quiet_third_parties()
    run = load_config(config, overrides or ())
    results = evaluate_models(run, model or [run.model.path], random_head)

    if json:
        import json as encoder

        output.echo_json(encoder.dumps(results, indent=1, ensure_ascii=False))
        return

    # Models need not have the same metrics: one scored by several prompts also has a best and a
    # worst of each. A dictionary as an ordered set.
    names: dict[str, None] = {}
    for metrics in results.values():
        names |= dict.fromkeys(tables.scalar_names(metrics))

    rows = []
    for name in names:
        values = [tables.number(metrics.get(name)) for metrics in results.values()]
        rows.append([tables.label(name), *values])

    heads = [path + HEAD_NOTES.get(metrics["head"], "") for path, metrics in results.items()]
    held_out = ", ".join(source.path for source in run.evaluation.data)
    output.echo(format_table(f"{tables.label(run.task.name)} on {held_out}", rows, ["", *heads]))

    for path, metrics in results.items():
        if "by_template" in metrics:
            task_metrics = task_class(run.task.name).metrics
            output.echo(tables.by_template(path, metrics["by_template"], task_metrics))


def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, such as `export` writes.")
    ],
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, folders, globs or URLs.")
    ],
    out: Annotated[
        str,
        typer.Option(
            help="Output to write or resume: a local file (.jsonl), or a folder or URL for shards."
        ),
    ],
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Ray workers, each with the model, that write shards. 0: this process."
        ),
    ] = 0,
    suffix: Annotated[
        str, typer.Option("--format", help="Format of shards: jsonl or parquet.")
    ] = "jsonl",
    batch: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 32,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of generated text, in tokens.")
    ] = 128,
    strategy: Strategy = "greedy",
) -> None:
    """Predict a label, tags, an answer, a number, a vector or a text for each row.

    Rows keep their order and their columns and get one more, `prediction`. The model's task decides
    which columns are read: `text` (and `pair`), `tokens`, `question` and `context`, `source`, or
    `prompt`. If interrupted, the same command resumes. A folder holds one shard for about 2 MiB of
    input, the same for any number of workers.

    \b
    Examples:
      dist-ft predict out/ new.jsonl --out predictions.jsonl
      dist-ft predict out/ "s3://bucket/rows/*.parquet" --out s3://bucket/predictions \\
        --format parquet --workers 8

    Next: dist-ft data inspect predictions.jsonl
    """
    from dist_ft import api
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    written = api.predict(
        model,
        paths,
        out,
        workers=workers,
        suffix=suffix,
        batch=batch,
        max_new_tokens=max_new_tokens,
        strategy=strategy,
    )

    # A folder may already hold shards of an interrupted call: these numbers are those of this one.
    if out.endswith(".jsonl"):
        output.echo(f"{written.rows:,} rows in {out}")
    else:
        output.echo(f"{written.files:,} shards in {out}; {written.rows:,} rows written now")


def decode(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model folder, URL or hub name. Several are compared. Default: model.path."
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="Decoding strategy, as for `generate`. Several are compared. "
            "Default: evaluation.decoding."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with the first generations.")
    ] = False,
) -> None:
    """Compare decoding strategies on held-out prompts: text metrics, seconds, tokens per second.

    Prompts, lengths and metrics come from the section evaluation.
    evaluation.decoding.max_new_tokens must be set.

    \b
    Examples:
      dist-ft decode configs/recipes/translation.yaml --strategy greedy --strategy beam:4
      dist-ft decode configs/recipes/math.yaml evaluation.generate_samples=50 --model out/

    Next: set the best as evaluation.decoding, or pass it to dist-ft predict MODEL FILE --strategy.
    """
    from dist_ft.cli import tables
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.inference.compare_decoding import compare
    from dist_ft.training.console import format_table

    quiet_third_parties()
    run = load_config(config, overrides or ())
    results = compare(run, model or [run.model.path], strategy or [])

    if json:
        import json as encoder

        output.echo_json(encoder.dumps(results, indent=1, ensure_ascii=False))
        return

    # All strategies are scored by the same metrics, so the names of the first result suffice.
    names = tables.scalar_names(results[0])
    rows = []
    for result in results:
        values = [tables.number(result[name]) for name in names]
        rows.append([result["strategy"], result["model"], *values])

    held_out = ", ".join(source.path for source in run.evaluation.data)
    columns = ["", "model", *map(tables.label, names)]
    output.echo(format_table(f"generations on {held_out}", rows, columns))
