"""The command line: `dist-ft train | check | plan | submit | jobs | data | runs | k8s | ...`.

Every failure is one clear text on stderr and an exit code (see `failures`). `--help` imports
nothing heavy.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dist_ft.cli import (
    data,
    export,
    failures,
    init,
    jobs,
    k8s,
    models,
    output,
    plan,
    runs,
    selftest,
    train,
    workflows,
)
from dist_ft.config.task_facts import allow_task
from dist_ft.core.errors import Interrupted
from dist_ft.core.output import redacted_output
from dist_ft.core.private_folders import keep_compiled_code_private

app = typer.Typer(
    name="dist-ft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fully fine-tune large language models on many GPUs. Ray places the workers, DeepSpeed "
    "ZeRO shards the model.\n\n\b\nFirst steps:\n"
    "  dist-ft init --tiny mine              make a small model, data and config to try\n"
    "  dist-ft check configs/single.yaml     find everything that is wrong with the run\n"
    "  dist-ft preview configs/single.yaml   see which tokens are targets\n"
    "  dist-ft train configs/single.yaml     train",
)

OwnTask = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="MODULE:CLASS",
        help="Your own task that a folder of a run or a model names: allow its code to run. "
        "Tasks that your config names need no option.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks (also DIST_FT_DEBUG=1).")]

COMMANDS: tuple[Callable[..., None], ...] = (
    *(init.init, train.train, train.check, plan.plan, data.preview),
    *(models.generate, export.export, models.evaluate, models.predict, models.decode),
    *(jobs.submit, workflows.stages, workflows.tune, selftest.drill, selftest.selftest),
)
GROUPS = {"data": data, "runs": runs, "jobs": jobs, "k8s": k8s}


@app.callback()
def _options(debug: Debug = False, task: OwnTask = None) -> None:
    if debug:
        os.environ["DIST_FT_DEBUG"] = "1"
    for name in task or ():
        allow_task(name)


def _register(group: typer.Typer, function: Callable[..., None], name: str | None = None) -> None:
    """Register `function` as a command of `group`; Ctrl-C in it raises `Interrupted`."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise Interrupted(
                "stopped by the user. Committed checkpoints are kept. The same command resumes."
            ) from error

    group.command(name)(guarded)


for _function in COMMANDS:
    _register(app, _function)
for _name, _module in GROUPS.items():
    _group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=_module.HELP)
    _module.commands(functools.partial(_register, _group))
    app.add_typer(_group, name=_name)


def main() -> None:
    """Run the command line; every failure becomes a text on stderr and an exit code."""
    output.forgive_encoding()
    keep_compiled_code_private()
    with redacted_output():
        try:
            # Not standalone: the parser would print errors itself, which quote the arguments.
            code = app(standalone_mode=False)
            failures.leave(code if isinstance(code, int) else 0)
        except SystemExit as end:
            failures.leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        except typer.Abort:
            output.echo("Aborted!", err=True)
            failures.leave(1)
        except BaseException as error:
            # Not only Exception: a panic of a library in Rust is none, and neither is Ctrl-C.
            failures.leave(failures.report_error(error))
