"""Shards that hold tokens already: an Arrow table with `input_ids`, and `targets` (1 where a token is learned) or none.

What `dist-ft data write --tokenise` makes. Such shards are not rendered or tokenised again; the tokenizer that made
them is the writer's business, except that every id must be one of the model's. They are used whole or not at all,
whatever data.bad_rows says: a bad row here is a fault of the program that wrote the shard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import row_error

if TYPE_CHECKING:
    from dist_ft.data.encoding.encoded import (
        EncodedRows,
    )

AGAIN = "shards of tokens are used whole or not at all; write the shard again"


def is_pretokenized(rows: Any, kind: str) -> bool:
    """Tell whether rows (a list or an Arrow table) are tokens, as data.format `kind` says or by their columns."""
    if kind != "auto":
        return kind == "tokens"
    if isinstance(rows, list):
        return any(isinstance(row, dict) and "input_ids" in row for row in rows)
    return "input_ids" in rows.column_names


def encode(table: Any, vocabulary: int, url: str, first: int) -> EncodedRows:
    """Return the rows of `table` (or of a list) as they are; without `targets` every token is learned.

    Raises:
        DataError: a column of another type or length, an id that is not in 0 .. vocabulary - 1, or a target that is
            neither 0 nor 1; also under data.bad_rows=skip.
    """
    from dist_ft.data.encoding.encoded import (
        EncodedRows,
    )

    if isinstance(table, list):
        table = _as_table(table, url)
    if "input_ids" not in table.column_names:
        raise DataError(
            redact(
                f"{url}: data.format=tokens, and there are the columns {', '.join(table.column_names)}; "
                "input_ids is needed (and targets, if not all are learned); set data.format"
            )
        )
    ids, offsets = _column(table, "input_ids", url, first)
    targets = np.ones(len(ids), dtype=np.uint8)
    if "targets" in table.column_names:
        targets, others = _column(table, "targets", url, first)
        if not np.array_equal(offsets, others):
            row = int(np.flatnonzero(np.diff(offsets) != np.diff(others))[0])
            raise row_error(
                url,
                first + row,
                f"input_ids and targets differ in length; one target a token is needed; {AGAIN}",
            )
    for name, values, stop, what in (
        (
            "input_ids",
            ids,
            vocabulary,
            "the shard was written for another tokenizer; write it again with this one",
        ),
        ("targets", targets, 2, f"1 is a token that is learned, 0 one that is not; {AGAIN}"),
    ):
        wrong = np.flatnonzero((values < 0) | (values >= stop))
        if len(wrong):
            row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
            raise row_error(
                url,
                first + row,
                f"{name} has {values[wrong[0]]}; 0 to {stop - 1} are allowed; {what}",
            )
    return EncodedRows(
        ids.astype(np.int32), targets.astype(np.uint8), offsets, "tokens", (len(table),), ()
    )


def _as_table(rows: list[Any], url: str) -> Any:
    """Return decoded rows as an Arrow table of the columns any of them has; the first not decoded is raised."""
    import pyarrow as pa

    for row in rows:
        if isinstance(row, DataError):
            raise DataError(f"{row} ({AGAIN})") from row
    names = [name for name in ("input_ids", "targets") if any(name in row for row in rows)]
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(
            redact(f"{url}: its tokens are not lists of whole numbers ({error}); {AGAIN}")
        ) from error


def _column(table: Any, name: str, url: str, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a list column as they are, one row after the other, and where each row begins and ends."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not (
        pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)
    ):
        raise DataError(
            redact(
                f"{url}: the column {name} is {kind}; lists of whole numbers are needed; {AGAIN}"
            )
        )
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise row_error(url, first + row, f"has no {name}, as other rows have; {AGAIN}")
    offsets = np.from_dlpack(column.offsets).astype(
        np.int64
    )  # pyarrow's own way to numpy imports pandas
    values = (
        column.values.slice(offsets[0], offsets[-1] - offsets[0]) if len(offsets) else column.values
    )
    offsets = offsets - offsets[0]
    if values.null_count:
        gap = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(offsets, gap, side="right")) - 1
        raise row_error(
            url, first + row, f"{name} has a gap (null); a number for each token is needed; {AGAIN}"
        )
    return np.from_dlpack(
        values.cast(pa.uint8()) if pa.types.is_boolean(values.type) else values
    ), offsets
