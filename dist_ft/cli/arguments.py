"""Arguments that several commands share, and what they stand for."""

from __future__ import annotations

from typing import Annotated, NamedTuple

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


class NamedRun(NamedTuple):
    """A run that a command was given.

    Attributes:
        url: the run's folder.
        places: paths, URLs and hub names of data in the user's config; none for a folder.
    """

    url: str
    places: tuple[str, ...] = ()


def run_url(run: str, overrides: list[str] | None) -> str:
    """Return the URL of a run given by its config or its folder; see `named_run`."""
    return named_run(run, overrides).url


def named_run(run: str, overrides: list[str] | None) -> NamedRun:
    """Return a run given by its config or its folder, and configure storage as the user says.

    That is by the config, or, for a folder, by overrides of storage.options; never by what is
    stored in the folder.

    Raises:
        ConfigError: the config is broken, or other fields are overridden for a folder.
    """
    # Imported when a command runs, here as in all commands: `--help` has to be fast.
    from dist_ft.config.load import load_config, load_storage_overrides
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.storage import filesystem

    quiet_third_parties()
    if not is_config_file(run):
        filesystem.configure(load_storage_overrides(overrides or ()).options)
        return NamedRun(run)

    from dist_ft.runs.stored_run import named_places

    config = load_config(run, overrides or ())
    filesystem.configure(config.storage.options)
    return NamedRun(config.run_url, named_places(config))
