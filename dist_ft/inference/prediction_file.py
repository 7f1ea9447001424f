"""Predictions of many rows as one local file of JSON lines, in their order. What was cut off is gone on with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import Row
from dist_ft.inference.predict import Predictor

BESIDE = ".model"
"""End of the name of the file beside the rows that says which model they are of."""
CHUNK_ROWS = 2048
"""Rows that are sorted by length, and written, together."""


def predict_file(
    predictor: Predictor,
    rows: Iterator[Row | DataError],
    out: str,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Write each row with what the model says of it (`prediction`) to the local file `out`, JSON lines.

    Returns how many rows there are. A file that is there is gone on with: as many rows as it has whole lines are passed
    over. Raises DataError if they are of another model.
    """
    path = Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _whole_lines(path)
    beside = path.with_name(path.name + BESIDE)
    if done and (not beside.exists() or beside.read_text("utf-8") != predictor.version):
        raise DataError(
            redact(
                f"--out={out}: holds what another model said of {done} rows, or this one before it was "
                "made anew; name another file, or remove this one"
            )
        )
    beside.write_text(predictor.version, "utf-8")
    with open(path, "a", encoding="utf-8") as file:
        chunk: list[Row] = []
        number = 0  # of the row, from 1
        for row in rows:
            number += 1
            if isinstance(row, DataError):
                raise row
            if number > done:
                chunk.append(row)
            if len(chunk) == CHUNK_ROWS:
                _write(predictor, chunk, number - len(chunk), file)
                chunk = []
                progress(number)
        _write(predictor, chunk, number - len(chunk), file)
    if number < done:
        raise DataError(
            redact(
                f"--out={out}: holds {done} rows and there are {number}; it is the file of other "
                "rows; name another"
            )
        )
    return number


def _write(predictor: Predictor, rows: list[Row], first: int, file: Any) -> None:
    for row, value in zip(rows, predictor.predict(rows, first) if rows else (), strict=True):
        file.write(json.dumps({**row, "prediction": value}, ensure_ascii=False, default=str) + "\n")
    file.flush()


def _whole_lines(path: Path) -> int:
    """Return how many whole lines a file has; what follows them is cut off."""
    if not path.exists():
        return 0
    held = path.read_bytes()
    end = held.rfind(b"\n") + 1
    if end < len(held):
        os.truncate(path, end)
    return held.count(b"\n")
