"""Files of rows that the data commands read and write."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_ft.core.errors import DataError
    from dist_ft.data.sources.discovery import Row


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """Return {name: share} of NAME=SHARE texts."""
    from dist_ft.core.errors import ConfigError

    shares = {}
    for text in texts:
        name, _, value = text.partition("=")

        share = math.nan
        with contextlib.suppress(ValueError):
            share = float(value)

        if not name or name in shares or math.isnan(share):
            raise ConfigError(
                [
                    f"--share={text}: not of the form NAME=SHARE. Each NAME is allowed once. "
                    "Write for instance train=0.8."
                ],
                "data split",
            )
        shares[name] = share
    return shares


def read_rows(paths: Sequence[str]) -> Iterator[Row | DataError]:
    """Return the rows of files, folders, globs or URLs, in order.

    Paths are resolved at once, rows are read as they are needed.
    """
    from dist_ft.config.schema import Source
    from dist_ft.data.sources import readers
    from dist_ft.data.sources.discovery import discover_shards

    # Not a generator function: its body, and so a wrong path, would wait for the first row.
    found = discover_shards([Source(path=path) for path in paths], "PATH")
    return (row for shards in found for shard in shards for row in readers.iter_rows(shard))


def write_rows(rows: list[Any], out: str) -> None:
    """Write rows to a JSON Lines file."""
    from dist_ft.core.errors import DataError
    from dist_ft.data.tools.write import encode_jsonl
    from dist_ft.storage.single_files import write_file

    if not rows:
        raise DataError(f"{out}: no rows to write. At least one is needed. Check the source.")

    write_file(out, encode_jsonl(rows))
