"""Encode shards that hold tokens.

They are Arrow tables with `input_ids`, and optionally `targets` (1 for a target token).
`dist-ft data write --tokenize` writes such shards. They are not rendered or tokenized again. The
writer chooses the tokenizer; the only check is that every id is in the model's vocabulary. Shards
of tokens are used whole or not at all, whatever data.bad_rows says: a bad row here is a bug of the
program that wrote the shard.

n is the number of rows, `sum` the number of their tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.sources.discovery import RowLocation

_REWRITE_HINT = "Shards of tokens are used whole or not at all. Write the shard again."


class _ListColumn(NamedTuple):
    """A column of lists.

    Attributes:
        values: (sum,) the items of all rows, one row after the other.
        offsets: (n + 1,) int64: row i is values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    def row_of(self, position: int) -> int:
        """Return the row, from 0, that holds the value at `position`."""
        return int(np.searchsorted(self.offsets, position, side="right")) - 1


def is_pretokenized(rows: Any, format: str) -> bool:
    """Return whether rows (a list or an Arrow table) hold tokens."""
    if format != "auto":
        return format == "tokens"
    if isinstance(rows, list):
        # any row, not the first: a row that could not be decoded is a DataError
        return any(isinstance(row, dict) and "input_ids" in row for row in rows)
    return "input_ids" in rows.column_names


def encode(table: Any, vocabulary_size: int, url: str, first_row: int) -> EncodedRows:
    """Return the rows of `table` as they are; without `targets` every token is a target.

    Args:
        table: the rows, as an Arrow table or a list.
        vocabulary_size: every id must be below it.
        url: URL of the shard.
        first_row: number of the first row in its shard, from 1.

    Raises:
        DataError: a column of another type or length, an id that is not in 0 .. vocabulary_size -
            1, or a target that is neither 0 nor 1; also under data.bad_rows=skip.
    """
    if isinstance(table, list):
        table = _to_table(table, url)
    if "input_ids" not in table.column_names:
        raise DataError(
            redact(
                f"{url}: data.format=tokens, but the columns are {', '.join(table.column_names)}. "
                "It needs input_ids (and targets, if not all tokens are targets). Set "
                "data.format."
            )
        )

    ids = _read_list_column(table, "input_ids", url, first_row)
    marks = _ListColumn(np.ones(len(ids.values), dtype=np.uint8), ids.offsets)
    if "targets" in table.column_names:
        marks = _read_list_column(table, "targets", url, first_row)

        # equal offsets mean equal lengths, as both start at 0
        if not np.array_equal(ids.offsets, marks.offsets):
            differs = np.diff(ids.offsets) != np.diff(marks.offsets)  # (n,)
            row = int(np.flatnonzero(differs)[0])
            raise RowLocation(url, first_row + row).error(
                "input_ids and targets differ in length. Each token needs one target. "
                f"{_REWRITE_HINT}"
            )

    other_tokenizer = "The shard was written for another tokenizer. Write it again with this one."
    _check_values(ids, "input_ids", vocabulary_size, other_tokenizer, url, first_row)
    target_meaning = f"1 marks a target token, 0 any other. {_REWRITE_HINT}"
    _check_values(marks, "targets", 2, target_meaning, url, first_row)
    return EncodedRows(
        ids.values.astype(np.int32),
        marks.values.astype(np.uint8),
        ids.offsets,
        "tokens",
        (len(table),),
        (),
    )


def _check_values(
    column: _ListColumn, name: str, stop: int, advice: str, url: str, first_row: int
) -> None:
    """Refuse a value outside of 0 .. stop - 1."""
    wrong = np.flatnonzero((column.values < 0) | (column.values >= stop))
    if len(wrong):
        row = column.row_of(wrong[0])
        raise RowLocation(url, first_row + row).error(
            f"{name} has {column.values[wrong[0]]}. 0 to {stop - 1} are allowed. {advice}"
        )


def _to_table(rows: list[Any], url: str) -> Any:
    """Return rows as an Arrow table of `input_ids` and `targets`, as far as any row has them.

    Raises:
        DataError: a row that could not be decoded, or tokens that are not lists of integers.
    """
    import pyarrow as pa

    for row in rows:
        if isinstance(row, DataError):
            raise DataError(f"{row} {_REWRITE_HINT}") from row

    # a row without a column that others have becomes a null, which is refused with its number
    names = [name for name in ("input_ids", "targets") if any(name in row for row in rows)]
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(
            redact(f"{url}: its tokens are not lists of integers ({error}). {_REWRITE_HINT}")
        ) from error


def _read_list_column(table: Any, name: str, url: str, first_row: int) -> _ListColumn:
    """Return a column of lists of integers without copying its values.

    Raises:
        DataError: another type, a row without a list, or a null among the values.
    """
    import pyarrow as pa

    column = table.column(name).combine_chunks()
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)

    # booleans, because `targets` may be such
    is_allowed = is_list and (
        pa.types.is_integer(kind.value_type) or pa.types.is_boolean(kind.value_type)
    )
    if not is_allowed:
        raise DataError(
            redact(
                f"{url}: the column {name} is {kind}. It must be lists of integers. {_REWRITE_HINT}"
            )
        )

    if isinstance(column, pa.ChunkedArray):
        chunks = column.chunks or [pa.array([], kind)]  # concat_arrays needs at least one
        column = pa.concat_arrays(chunks)

    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise RowLocation(url, first_row + row).error(
            f"has no {name}, which other rows have. {_REWRITE_HINT}"
        )

    # dlpack, because pyarrow's own conversion to numpy imports pandas
    offsets = np.from_dlpack(column.offsets).astype(np.int64)
    values = column.values

    # A sliced table shares the values of the whole table: take only those of its own rows.
    if len(offsets):
        values = values.slice(offsets[0], offsets[-1] - offsets[0])
    offsets = offsets - offsets[0]
    if values.null_count:
        null = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(offsets, null, side="right")) - 1
        raise RowLocation(url, first_row + row).error(
            f"{name} has a null. Each token needs a number. {_REWRITE_HINT}"
        )

    # Arrow stores booleans as bits, which dlpack cannot pass on
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    return _ListColumn(np.from_dlpack(values), offsets)
