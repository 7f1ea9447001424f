"""The commands `dist-ft runs list | show | watch | report | verify | diff | prune`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli import output
from dist_ft.cli.arguments import Overrides, Run, run_url

HELP = (
    "Inspect, verify and clean up what runs have stored.\n\n\b\nFirst steps:\n"
    "  dist-ft runs list runs/           list the runs\n"
    "  dist-ft runs show runs/mine       attempts, checkpoints, where time went\n"
    "  dist-ft runs verify runs/mine     check every checkpoint against its checksums"
)


def commands(register: Callable[..., Any]) -> None:
    """Register every command of this module.

    Args:
        register: takes (function) or (function, name); without a name, the command has the
            function's.
    """
    register(list_runs, "list")
    for command in (show, watch, report, verify, diff, prune):
        register(command)


def list_runs(
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE", help="Folder or URL that run.storage names.")
    ],
) -> None:
    """List the runs in a storage folder: latest step, checkpoints, attempts.

    \b
    Examples:
      dist-ft runs list runs/
      dist-ft runs list s3://bucket/runs

    Next: dist-ft runs show STORAGE/NAME
    """
    from dist_ft.runs import catalog

    output.echo(catalog.describe_all(storage))


def show(run: Run, overrides: Overrides = None) -> None:
    """Show a run's attempts, workers that hung, checkpoints, and where time went.

    \b
    Examples:
      dist-ft runs show runs/mine
      dist-ft runs show configs/llama-8b.yaml run.name=mine

    Next: dist-ft runs verify RUN
    """
    from dist_ft.runs import catalog

    output.echo(catalog.describe(run_url(run, overrides)))


def watch(
    run: Run,
    overrides: Overrides = None,
    once: Annotated[bool, typer.Option("--once", help="Print the current state and exit.")] = False,
) -> None:
    """Follow a run's metrics, from any machine that can read its storage, until the run ends.

    \b
    Examples:
      dist-ft runs watch runs/mine
      dist-ft runs watch s3://bucket/runs/mine --once

    Next: dist-ft runs show RUN
    """
    from dist_ft.runs import watch_run
    from dist_ft.training.console import Console

    output.echo(watch_run.watch(run_url(run, overrides), once, Console().print))


def report(
    run: Run,
    out: Annotated[
        str, typer.Option(help="Local folder for report.html, report.md and report.json.")
    ],
    overrides: Overrides = None,
    attributions: Annotated[
        bool,
        typer.Option(
            "--attributions",
            help="Also show which tokens led to the errors (integrated gradients). Runs the model.",
        ),
    ] = False,
) -> None:
    """Write a run's report: curves, metrics before and after, tables, errors, configuration.

    The HTML is one self-contained page.

    \b
    Examples:
      dist-ft runs report runs/mine --out report/
      dist-ft runs report configs/recipes/entities.yaml --out report/ --attributions

    Next: open report/report.html
    """
    from pathlib import Path

    from dist_ft.core.json_documents import decode_json, encode_json
    from dist_ft.core.redaction import redact, redact_values
    from dist_ft.runs import render_report
    from dist_ft.runs.report import gather

    url = run_url(run, overrides)
    content = gather(url)

    # Only attributions need the model and heavy libraries. All else was stored by the run.
    if attributions and content["examples"]:
        from dist_ft.core.logs import quiet_third_parties
        from dist_ft.inference.attributions import attribute
        from dist_ft.storage.filesystem import Store

        quiet_third_parties()
        examples, step = content["examples"], content["examples_step"]
        content["attributions"] = attribute(Store(url), examples, step)

    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    # Of plain data, as a redacted text may be no JSON. Examples of errors are content.
    plain = redact_values(decode_json(encode_json(content)), is_content=True)
    texts = {
        "html": redact(render_report.to_html(content), is_content=True),
        "md": redact(render_report.to_markdown(content), is_content=True),
        "json": encode_json(plain, indent=1).decode(),
    }
    for suffix, text in texts.items():
        (folder / f"report.{suffix}").write_text(text, "utf-8")
    output.echo(f"wrote report.html, report.md and report.json in {out}")


def verify(run: Run, overrides: Overrides = None) -> None:
    """Read every checkpoint of a run and check it against its manifest. Exits 1 if one differs.

    \b
    Examples:
      dist-ft runs verify runs/mine
      dist-ft runs verify configs/llama-8b.yaml run.name=mine

    Next: dist-ft data verify RUN proves that no sample was lost or repeated.
    """
    from dist_ft.core.logs import redact
    from dist_ft.runs import catalog

    # Print each result as it comes: reading every byte of a large checkpoint takes minutes.
    damaged = False
    for name, problem in catalog.verify(run_url(run, overrides)):
        damaged |= bool(problem)
        output.echo(redact(f"{name}: {problem or 'ok'}"))

    if damaged:
        raise typer.Exit(1)


def diff(
    run: Run,
    step: Annotated[list[int], typer.Option(help="Step of a checkpoint. Give it twice.")],
    overrides: Overrides = None,
) -> None:
    """Show how far each weight moved between two checkpoints.

    \b
    Examples:
      dist-ft runs diff runs/mine --step 500 --step 1000
      dist-ft runs diff s3://bucket/runs/mine --step 1000 --step 2000

    Next: dist-ft export RUN --out DIR --step STEP
    """
    from dist_ft.core.errors import ConfigError
    from dist_ft.runs import catalog

    if len(step) != 2:
        raise ConfigError(
            [f"--step: got {len(step)} steps, expected 2. Use --step A --step B."], "runs diff"
        )

    output.echo(catalog.diff(run_url(run, overrides), *step))


def prune(
    run: Run,
    overrides: Overrides = None,
    keep_last: Annotated[
        int, typer.Option(min=1, help="Number of latest checkpoints to keep.")
    ] = 1,
    keep_every_steps: Annotated[
        int, typer.Option(min=0, help="Also keep steps that are a multiple of this. 0: none.")
    ] = 0,
    keep_best: Annotated[
        int, typer.Option(min=0, help="Also keep this many with the lowest held-out loss. 0: none.")
    ] = 0,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them. Without it they are only listed.")
    ] = False,
) -> None:
    """Remove checkpoints of a finished run. The latest intact checkpoint always stays.

    A run in progress applies its own retention.

    \b
    Examples:
      dist-ft runs prune runs/mine                     list what would be removed
      dist-ft runs prune runs/mine --keep-last 2 --yes

    Next: dist-ft runs show RUN
    """
    from dist_ft.config.schema import CheckpointSection
    from dist_ft.runs import catalog

    # Not combined with the retention in the run's config, which the run has already applied.
    section = CheckpointSection(
        keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best
    )
    dropped = catalog.prune(run_url(run, overrides), section, yes)
    verb = "removed" if yes else "would remove"
    for name in dropped:
        output.echo(f"{verb}: {name}")

    plural = "" if len(dropped) == 1 else "s"
    count = f"{len(dropped)} checkpoint{plural}"
    hint = "; add --yes to remove" if dropped and not yes else ""
    output.echo(count + hint)
