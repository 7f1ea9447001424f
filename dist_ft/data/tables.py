"""Rows of Parquet and Arrow files, batch by batch, as Arrow tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from dist_ft.data import fetch
from dist_ft.data.blocks import END, Part, cut_range
from dist_ft.data.source import Shard
from dist_ft.errors import DataError
from dist_ft.logs import redact

BATCH_ROWS = 4096


def parquet_parts(shard: Shard, number: int, block_bytes: int) -> list[Part]:
    """Return parts of a Parquet shard: whole row groups put together, or cuts of one that is larger than a block."""
    parts: list[Part] = []
    with _decoding(shard):
        about = _parquet(shard).metadata
        found = [about.row_group(number) for number in range(about.num_row_groups)]
        groups = [(group.num_rows, group.total_byte_size) for group in found]
    first = start = size = 0
    for num_rows, num_bytes in groups:
        if first > start and size + num_bytes > block_bytes:
            parts.append(Part(number, start, first, size))
            start, size = first, 0
        first += num_rows
        size += num_bytes
        if size > 2 * block_bytes:
            cuts = cut_range(number, first - start, size, block_bytes)
            parts += [Part(number, start + cut.start, start + cut.stop, cut.num_bytes) for cut in cuts]
            start, size = first, 0
    return [*parts, Part(number, start, first, size)] if first > start or not parts else parts


def sizes(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (rows, bytes) of every record batch of an Arrow file."""
    with _decoding(shard):
        for batch in _record_batches(shard):
            yield batch.num_rows, batch.nbytes


def read(shard: Shard, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
    """Yield (part, Arrow table of its rows), ascending."""
    import pyarrow

    with _decoding(shard):
        if shard.kind == "parquet":
            file = _parquet(shard)
            for part in parts:
                yield part, _parquet_rows(file, part)
            return
        batches, at = _record_batches(shard), 0
        held: list[Any] = []  # rows from `at` on
        for part in parts:
            stop = part.stop
            while stop == END or at + sum(batch.num_rows for batch in held) < stop:
                batch = next(batches, None)
                if batch is None:
                    break
                held.append(batch)
            table = pyarrow.Table.from_batches(held)
            count = None if stop == END else stop - part.start
            yield part, table.slice(part.start - at, count)
            held = table.slice(stop - at).to_batches() if stop != END else []
            at = stop


def _parquet(shard: Shard) -> Any:
    """Return the opened Parquet file; checksums of pages are verified where it has them."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(fetch.ExactFile(shard.url, shard.size), pre_buffer=True,
                                       page_checksum_verification=True)


def _parquet_rows(file: Any, part: Part) -> Any:
    """Return the rows of a part, reading only the row groups it lies in."""
    import pyarrow

    about, first, skipped = file.metadata, 0, 0
    groups: list[int] = []
    stop = about.num_rows if part.stop == END else part.stop
    for number in range(about.num_row_groups):
        last = first + about.row_group(number).num_rows
        if first < stop and last > part.start:
            skipped = part.start - first if not groups else skipped
            groups.append(number)
        first = last
    wanted, batches = stop - part.start, []
    for batch in file.iter_batches(BATCH_ROWS, row_groups=groups):
        if skipped >= len(batch):
            skipped -= len(batch)
            continue
        batches.append(batch.slice(skipped, wanted))
        wanted -= len(batches[-1])
        skipped = 0
        if wanted == 0:
            break
    return pyarrow.Table.from_batches(batches, file.schema_arrow)


def _record_batches(shard: Shard) -> Iterator[Any]:
    """Yield the record batches of an Arrow file, of the stream or of the file format."""
    import io

    import pyarrow.ipc

    raw = io.BufferedReader(fetch.RangeFile(shard.url, shard.size), fetch.RANGE_BYTES)
    is_file = raw.peek(6)[:6] == b"ARROW1"
    if not is_file:
        yield from pyarrow.ipc.open_stream(raw)
        return
    file = pyarrow.ipc.open_file(raw)
    for number in range(file.num_record_batches):
        yield file.get_batch(number)


@contextlib.contextmanager
def _decoding(shard: Shard) -> Iterator[None]:
    """Turn what the decoder says into one `DataError`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise DataError(redact(f"{shard.url}: is not {shard.kind.capitalize()} that can be read ({first}); write the "
                               "shard again")) from error
