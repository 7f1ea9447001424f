"""Write rows as shards: Parquet or JSON Lines, behind any fsspec URL.

Guarantees: names contain the number of shards (`train-00000-of-00004.parquet`) and sort in row
order; each shard is written whole or not at all. Shards that were written earlier are not removed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import encode_json
from dist_ft.core.printable import printable_line
from dist_ft.data.sources.discovery import Row
from dist_ft.storage.filesystem import Store


def write_parquet(rows: Sequence[Row], store: Store, prefix: str, rows_per_shard: int) -> list[str]:
    """Write rows as .parquet shards of at most `rows_per_shard`; return their URLs in row order."""
    return _write_shards(rows, store, prefix, rows_per_shard, "parquet", encode_parquet)


def write_jsonl(rows: Sequence[Row], store: Store, prefix: str, rows_per_shard: int) -> list[str]:
    """Write rows as UTF-8 .jsonl shards of at most `rows_per_shard`; return their URLs in order."""
    return _write_shards(rows, store, prefix, rows_per_shard, "jsonl", encode_jsonl)


def _write_shards(
    rows: Sequence[Row],
    store: Store,
    prefix: str,
    rows_per_shard: int,
    suffix: str,
    encode: Callable[[Sequence[Row]], bytes],
) -> list[str]:
    """Write rows as shards named `prefix` with the content of `encode`."""
    if rows_per_shard < 1:
        raise DataError(f"rows_per_shard={rows_per_shard}: is too small. Use at least 1.")
    if not rows:
        raise DataError(
            f"{store.full_url(prefix)}: no rows to write. At least one is needed. Check the source."
        )

    total = -(-len(rows) // rows_per_shard)
    urls = []
    for number in range(total):
        # zero-padded: shards are read in the order of their names
        name = f"{prefix}-{number:05d}-of-{total:05d}.{suffix}"
        start = number * rows_per_shard
        store.write(name, encode(rows[start : start + rows_per_shard]))
        urls.append(store.full_url(name))

    return urls


def encode_parquet(rows: Sequence[Row]) -> bytes:
    """Return rows as a Parquet file with the columns of all rows and checksums of its pages."""
    import pyarrow
    import pyarrow.parquet

    # Columns of every row: pyarrow's `Table.from_pylist` takes those of the first row only.
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row))

    columns = {}
    for name in names:
        columns[name] = [row.get(name) for row in rows]
    try:
        table = pyarrow.table(columns)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError) as error:
        # Values of one column have different types, or are none that Arrow knows.
        reason = printable_line(str(error).splitlines()[0])
        raise DataError(
            f"parquet: the rows cannot be written ({reason}). A column needs one type, and text "
            "UTF-8. Write .jsonl, or repair the rows."
        ) from error

    # checksums of pages: `sources.tables` verifies them, so damage does not become other rows
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def encode_jsonl(rows: Sequence[Row]) -> bytes:
    """Return rows as JSON Lines in UTF-8."""
    return b"".join(encode_json(row) + b"\n" for row in rows)
