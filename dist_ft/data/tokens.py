"""Shards that hold tokens already: an Arrow table with `input_ids`, and `targets` (1 where a token is learned) or none.

What `dist-ft data write --tokenise` makes. Such shards are not rendered or tokenised again; the tokenizer that made
them is the writer's business, except that every id must be one of the model's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dist_ft.data.source import row_error
from dist_ft.errors import DataError
from dist_ft.logs import redact

if TYPE_CHECKING:
    from dist_ft.data.template import Encoded


def are_tokens(rows: Any, kind: str) -> bool:
    """Tell whether rows (a list or an Arrow table) are tokens, as data.format `kind` says or by their columns."""
    if kind != "auto":
        return kind == "tokens"
    if isinstance(rows, list):
        return any(isinstance(row, dict) and "input_ids" in row for row in rows[:1])
    return "input_ids" in rows.column_names


def encode(table: Any, vocabulary: int, url: str, first: int) -> Encoded:
    """Return the rows of `table` (or of a list) as they are; without `targets` every token is learned.

    Raises:
        DataError: a column of another type or length, or an id that is not in 0 .. vocabulary - 1.
    """
    from dist_ft.data.template import Encoded

    if isinstance(table, list):
        table = _as_table(table)
    if "input_ids" not in table.column_names:
        raise DataError(redact(f"{url}: data.format=tokens, and there are the columns {', '.join(table.column_names)}; "
                               "input_ids is needed (and targets, if not all are learned); set data.format"))
    ids, offsets = _column(table, "input_ids", np.int32, url)
    if "targets" in table.column_names:
        targets, others = _column(table, "targets", np.uint8, url)
        if not np.array_equal(offsets, others):
            row = int(np.flatnonzero(np.diff(offsets) != np.diff(others))[0])
            raise row_error(url, first + row, "input_ids and targets differ in length; one target a token is needed; "
                                              "write the shard again")
    else:
        targets = np.ones(len(ids), dtype=np.uint8)
    wrong = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if len(wrong):
        row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
        raise row_error(url, first + row, f"input_ids has {ids[wrong[0]]}; ids 0 to {vocabulary - 1} are allowed; the "
                                          "shard was written for another tokenizer; write it again with this one")
    return Encoded(ids, targets, offsets, "tokens", (len(table),), ())


def _as_table(rows: list[Any]) -> Any:
    """Return decoded rows as an Arrow table; the first that could not be decoded is raised."""
    import pyarrow as pa

    for row in rows:
        if isinstance(row, DataError):
            raise row
    return pa.Table.from_pylist([{name: row.get(name) for name in ("input_ids", "targets") if name in rows[0]}
                                 for row in rows])


def _column(table: Any, name: str, dtype: Any, url: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a list column, one row after the other, and where each row begins and ends."""
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not (
            pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)) or column.null_count:
        raise DataError(redact(f"{url}: the column {name} is {kind}; lists of whole numbers without gaps are needed; "
                               "write the shard again"))
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    offsets = np.asarray(column.offsets, dtype=np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0]) if len(offsets) else column.values
    return values.to_numpy(zero_copy_only=False).astype(dtype), offsets - offsets[0]
