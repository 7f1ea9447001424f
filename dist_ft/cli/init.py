"""The command `dist-ft init`."""

from __future__ import annotations

from typing import Annotated

import typer

from dist_ft.cli import output

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="New folder to write to.")]
Tiny = Annotated[
    bool, typer.Option("--tiny", help="Make a small model and data on the spot, without network.")
]


def init(folder: Folder, tiny: Tiny = False) -> None:
    """Write a small project to try dist-ft with: a model, data and a commented config.

    \b
    Examples:
      dist-ft init --tiny mine
      dist-ft init --tiny /tmp/try

    Next: dist-ft train mine/run.yaml
    """
    from dist_ft.core.errors import ConfigError
    from dist_ft.core.logs import quiet_third_parties
    from dist_ft.selftest.tiny_project import write_tiny_project

    if not tiny:
        raise ConfigError(
            [
                "--tiny is missing: other projects cannot be written yet. Add --tiny, or start "
                "from configs/single.yaml for a model and data of your own."
            ],
            "init",
        )

    quiet_third_parties()
    config = write_tiny_project(folder)
    output.echo(f"written: {config}\nnext:    dist-ft train {config}")
