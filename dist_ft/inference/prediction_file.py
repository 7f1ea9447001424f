"""Predictions of many rows as one local file of JSON lines, in their order.

The same command resumes a partial file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import encode_json
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import Row
from dist_ft.inference.predict import Predictor
from dist_ft.storage.local_files import read_regular

VERSION_SUFFIX = ".model"
"""Suffix of the file next to the rows with the version of the model that predicted them."""
CHUNK_ROWS = 2048
"""Rows that are sorted by length, and written, together."""


def predict_file(
    predictor: Predictor,
    rows: Iterator[Row | DataError],
    out: str,
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> int:
    """Write each row with its `prediction` to the local file `out`, as JSON lines.

    Return the number of rows.

    A file that exists is resumed: as many rows as it has whole lines are skipped. Raises DataError
    if it is of another model.
    """
    path = Path(out).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    num_done = _trim_to_whole_lines(path)
    version_file = path.with_name(path.name + VERSION_SUFFIX)
    if num_done and not _is_version(version_file, predictor.version):
        raise DataError(
            redact(
                f"--out={out}: holds {num_done} rows predicted by another model, or by an earlier "
                "version of this one. Only the same model can resume it. Name another file, or "
                "remove this one."
            )
        )

    # Before the first row, because rows without a version could not be resumed.
    version_file.write_text(predictor.version, "utf-8")

    with open(path, "ab") as file:
        chunk: list[Row] = []
        number = 0  # of the row, from 1
        for row in rows:
            number += 1
            if isinstance(row, DataError):
                raise row

            # Rows that are done are still read, because rows have no address to start from.
            if number > num_done:
                chunk.append(row)

            # Random draws follow from the number of a row, so a chunk comes with that of its first.
            if len(chunk) == CHUNK_ROWS:
                _write(predictor, chunk, number - len(chunk), file)
                chunk = []
                on_progress(number)

        _write(predictor, chunk, number - len(chunk), file)

    if number < num_done:
        raise DataError(
            redact(
                f"--out={out}: holds {num_done} rows, but the input has {number}. It must be the "
                "file of the same rows. Name another."
            )
        )

    return number


def _write(predictor: Predictor, rows: list[Row], start: int, file: Any) -> None:
    predictions: list[dict[str, Any]] = []
    if rows:
        predictions = predictor.predict(rows, start)

    for row, prediction in zip(rows, predictions, strict=True):
        line = {**row, "prediction": prediction}
        file.write(encode_json(line) + b"\n")

    # So that a killed command loses at most one chunk.
    file.flush()


def _is_version(version_file: Path, version: str) -> bool:
    return version_file.exists() and version_file.read_text("utf-8") == version


def _trim_to_whole_lines(path: Path) -> int:
    """Remove what follows the last whole line of a file; return the number of whole lines."""
    if not path.exists():
        return 0

    # A command that was killed while writing leaves a part of a line; its row is predicted again.
    content = read_regular(path)
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)

    return content.count(b"\n")
