"""Arguments that several commands share, and what they stand for."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file of the run (path or URL).")
]

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.FIELD=VALUE]...",
        help="Fields that override the file, such as schedule.steps=100.",
    ),
]

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Config of the run (.yaml), or the URL of its folder: <run.storage>/<run.name>.",
    ),
]

Strategy = Annotated[
    str,
    typer.Option(
        help="Decoding strategy: greedy, beam:4 (number of beams) or sample:0.7 (temperature). "
        "Further fields of evaluation.decoding follow after commas: beam:4,length_penalty=0.8 or "
        "sample:0.7,top_p=0.9,num_samples=3,seed=1."
    ),
]


def is_config_file(path: str) -> bool:
    """Return whether an argument names a YAML file."""
    return path.endswith((".yaml", ".yml"))


def run_url(run: str, overrides: list[str] | None) -> str:
    """Return the URL of a run given by its config or its folder.

    For a config, storage is configured as the config says.
    """
    # Imported when a command runs, here as in all commands: `--help` has to be fast.
    from dist_ft.config.load import load_config
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.storage import filesystem

    quiet_third_parties()
    if not is_config_file(run):
        return run

    config = load_config(run, overrides or ())
    filesystem.configure(config.storage.options)
    return config.run_url
