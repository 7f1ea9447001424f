"""The command line: `dist-ft train | check | plan | submit | jobs | data | runs | k8s | drill | evaluate | ...`.

Guarantees: what goes wrong is one clear text on stderr and an exit code (2: something to correct in what was asked;
1: the run failed; 130: stopped), never a stack trace unless --debug asks for it; `--help` imports nothing heavy.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli import data, drill, jobs, k8s, models, plan, runs, series
from dist_ft.cli.data import Config, Overrides
from dist_ft.core.errors import DistFtError, Interrupted, known

app = typer.Typer(
    name="dist-ft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fully fine-tune large language models on many GPUs: Ray places the workers, DeepSpeed ZeRO shards the model."
    "\n\n\b\nFirst steps:\n  dist-ft check configs/single.yaml     is all well with it?\n"
    "  dist-ft preview configs/single.yaml   what will be learned?\n"
    "  dist-ft train configs/single.yaml     learn it",
)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks (also DIST_FT_DEBUG=1).")]

SkipCheck = Annotated[
    bool,
    typer.Option(
        "--skip-check",
        help="Start without the probes of `check` (where only the workers see model and data).",
    ),
]


def _command(
    function: Callable[..., None], group: typer.Typer = app, name: str | None = None
) -> Callable[..., None]:
    """Register `function` as a command of `group` whose Ctrl-C is an `Interrupted`."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise Interrupted(
                "stopped by the user; what was committed is kept; the same command goes on from "
                "there"
            ) from error

    group.command(name)(guarded)
    return function


@app.callback()
def _options(debug: Debug = False) -> None:
    if debug:
        os.environ["DIST_FT_DEBUG"] = "1"


@_command
def train(config: Config, overrides: Overrides = None, skip_check: SkipCheck = False) -> None:
    """Run a fine-tuning to its end, or go on with one that was cut off.

    The same run.name under the same run.storage is the same run: it resumes from its newest checkpoint, at any number
    of workers. cluster.workers=0 trains in this process; 1 or more on Ray workers with DeepSpeed.

    \b
    Examples:
      dist-ft train configs/single.yaml
      dist-ft train configs/llama-8b.yaml run.name=mine cluster.workers=4..16 optimizer.learning_rate=1e-5

    Next: dist-ft export CONFIG --out DIR, which writes a folder any Hugging Face tool reads.
    """
    from dist_ft import api
    from dist_ft.config.load import load_config

    api.train(load_config(config, overrides or ()), skip_check=skip_check)


@_command
def check(config: Config, overrides: Overrides = None) -> None:
    """Say everything that is wrong with a run before a GPU is taken, all at once.

    Looks at the config, model, tokenizer, data, storage, an older run of the same name, and this machine. Exits 2 and
    lists every problem with its remedy, or prints the batch arithmetic written out, and ok.

    \b
    Examples:
      dist-ft check configs/llama-8b.yaml
      dist-ft check configs/llama-70b.yaml data.train=s3://bucket/shards/ cluster.workers=64

    Next: dist-ft preview CONFIG shows what would be learned.
    """
    from dist_ft.config.load import inspect_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.planning.batch import batch_arithmetic
    from dist_ft.runtime.preflight import check_run

    quiet_third_parties()
    run, problems, source = inspect_config(config, overrides or ())
    problems = problems + check_run.check(run, whole=not problems)
    if problems:
        raise ConfigError(problems, source)
    for name, arithmetic in batch_arithmetic(run):
        typer.echo(f"{name:<14}{arithmetic}")
    typer.echo("ok")


@_command
def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder, such as `export` wrote.")
    ],
    prompt: Annotated[str, typer.Option(help="What to answer.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    strategy: models.Strategy = "greedy",
) -> None:
    """Let a model folder answer a prompt, with plain transformers, through its chat template if it has one.

    \b
    Examples:
      dist-ft generate out/ --prompt "What does os.path.join do?"
      dist-ft generate out/ --prompt "Why is the sky blue?" --max-new-tokens 64 --strategy sample:0.7,top_p=0.9,seed=1

    Next: compare with the model you began from: dist-ft generate BASE_MODEL --prompt ...
    """
    from dist_ft import api
    from dist_ft.core.logs import quiet_third_parties

    quiet_third_parties()
    typer.echo(
        api.generate(model, prompt, system=system, max_new_tokens=max_new_tokens, strategy=strategy)
    )


@_command
def export(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help=("Config of the run (.yaml), or the URL of its folder: <run.storage>/<run.name>."),
        ),
    ],
    out: Annotated[str, typer.Option(help="Local folder to write.")],
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Committed step; none: the newest.")
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="The best step by checkpoint.best_by.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16 or float32 of the weights written; none: as the model was trained."
        ),
    ] = None,
    average: Annotated[
        bool | None,
        typer.Option(
            "--ema/--no-ema", help="The average of the weights; else if evaluation.of says so."
        ),
    ] = None,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter", help="Write a LoRA or IA3 adapter alone, for peft; else it is merged."
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="8-bit weights (torchao); size, latency and scores before and after."
        ),
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder: safetensors, config, tokenizer, chat template, model card.

    It is read back with plain transformers and its logits compared before this says done.

    \b
    Examples:
      dist-ft export configs/llama-8b.yaml --out llama-mine/ --dtype bfloat16
      dist-ft export s3://bucket/runs/mine --out mine-at-500/ --step 500

    Next: dist-ft generate DIR --prompt "..."
    """
    from dist_ft import api
    from dist_ft.config.load import load_config
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties

    if dtype not in (None, "bfloat16", "float32"):
        raise ConfigError(
            [f"--dtype={dtype}: no such choice; allowed: bfloat16, float32; correct it"], "export"
        )
    quiet_third_parties()
    is_config = run.endswith((".yaml", ".yml"))
    if best and step is not None:
        raise ConfigError(
            [
                f"--step={step}: with --best the step is found; one of them is allowed; leave one out"
            ],
            "export",
        )
    measured = api.export(
        load_config(run, overrides or ()) if is_config else run,
        out,
        step=step,
        dtype=dtype,
        adapter=adapter,
        best=best,
        int8=int8,
        average=average,
    )
    if measured:
        typer.echo(models.before_after("int8 weights", measured))
    typer.echo(f"wrote {out}" + ("" if adapter else f"; next: {api.next_step(out)}"))


_command(plan.plan)
_command(data.preview)
_command(models.evaluate)
_command(models.predict)
_command(models.decode)
_command(drill.drill)
_command(jobs.submit)
_command(drill.selftest)
_command(series.stages)
_command(series.tune)
_data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=data.HELP)
data.commands(lambda function, name=None: _command(function, _data, name))
app.add_typer(_data, name="data")
_runs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=runs.HELP)
runs.commands(lambda function, name=None: _command(function, _runs, name))
app.add_typer(_runs, name="runs")
_k8s = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=k8s.HELP)
k8s.commands(lambda function, name=None: _command(function, _k8s, name))
app.add_typer(_k8s, name="k8s")
_jobs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=jobs.HELP)
jobs.commands(lambda function, name=None: _command(function, _jobs, name))
app.add_typer(_jobs, name="jobs")


def main() -> None:
    """Run the command line; every failure becomes a text on stderr and an exit code."""
    try:
        app()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
    except DistFtError as error:
        _leave(_failed(_said(error), error.exit_code, error))
    except Exception as error:
        meant = known(error)
        _leave(_failed(_unexpected(error) if meant is None else _said(meant), 1, error))


def _leave(code: int) -> None:
    """Exit; in the way of one that was in a process group, if it was (what knows is imported then)."""
    local = sys.modules.get("dist_ft.runtime.local")
    (local.leave if local else sys.exit)(code)


def _said(error: DistFtError) -> str:
    from dist_ft.core.logs import redact

    return redact(f"dist-ft: {error}")


def _failed(text: str, code: int, error: BaseException) -> int:
    if os.environ.get("DIST_FT_DEBUG") == "1":
        import traceback

        from dist_ft.core.logs import redact

        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)
    print(text, file=sys.stderr)
    return code


def _unexpected(error: Exception) -> str:
    """Save the traceback in a file of its own and return the line that names it."""
    import tempfile
    import traceback

    from dist_ft.core.logs import redact

    with tempfile.NamedTemporaryFile(
        "w", prefix="dist-ft-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(redact("".join(traceback.format_exception(error))))
    what = redact(" ".join(str(error).split()))[:200]
    return (
        f"dist-ft: unexpected {type(error).__name__}: {what}; this is a gap in dist_ft; the traceback is in "
        f"{file.name}; please report it"
    )


if __name__ == "__main__":
    main()
