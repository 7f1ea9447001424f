"""Read the texts of rows without labels, as `dist-ft predict` gets them."""

from __future__ import annotations

from collections.abc import Sequence

from dist_ft.config.sections.task import ColumnsSection
from dist_ft.core.errors import DataError
from dist_ft.data.sources.discovery import Row


def read_inference_text(row: Row, column: str) -> str:
    """Return the text in a column of a row.

    Raises:
        DataError: the row has no such column, or no text in it.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        columns = ", ".join(map(str, row)) or "no columns"
        raise DataError(
            f"a row has no text in '{column}' (it has {columns}). A text is needed. Rename its "
            "column, or remove the row."
        )
    return value


def read_inference_texts(rows: Sequence[Row], columns: ColumnsSection) -> list[list[str]]:
    """Return the texts, and the second texts if rows have them."""
    pair = columns.pair or ("pair" if all("pair" in row for row in rows) else None)
    names = [columns.text] if pair is None else [columns.text, pair]
    return [[read_inference_text(row, name) for row in rows] for name in names]
