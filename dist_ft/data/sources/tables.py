"""Rows of Parquet and Arrow files, batch by batch, as Arrow tables."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.block import END, Part, cut_range
from dist_ft.data.sources import ranged_reads
from dist_ft.data.sources.discovery import Shard

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
            parts += [
                Part(number, start + cut.start, start + cut.stop, cut.num_bytes, start)
                for cut in cuts
            ]
            start, size = first, 0
    return [*parts, Part(number, start, first, size)] if first > start or not parts else parts


def sizes(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (rows, bytes) of every record batch of an Arrow file."""
    with _decoding(shard):
        for _, batch in _record_batches(*_arrow(shard)):
            yield batch.num_rows, batch.nbytes


def read(shard: Shard, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
    """Yield (part, Arrow table of its rows), ascending, in one pass."""
    with _decoding(shard):
        if shard.kind == "parquet":
            file = _parquet(shard)
            yield from _by_parts(_row_groups(file, parts), parts, file.schema_arrow)
        else:
            reader, is_file = _arrow(shard)
            yield from _by_parts(_record_batches(reader, is_file), parts, reader.schema)


def _by_parts(
    batches: Iterator[tuple[int, Any]], parts: Sequence[Part], schema: Any
) -> Iterator[tuple[Part, Any]]:
    """Yield (part, table of its rows) from (first row, batch) in order; holds no batch that ends before the part."""
    import pyarrow

    held: deque[tuple[int, Any]] = deque()
    for part in parts:
        while held and held[0][0] + len(held[0][1]) <= part.start:
            held.popleft()
        while part.stop == END or not held or held[-1][0] + len(held[-1][1]) < part.stop:
            first, batch = next(batches, (0, None))
            if batch is None:
                break
            if first + len(batch) > part.start:
                held.append((first, batch))
        table = pyarrow.Table.from_batches([batch for _, batch in held], schema)
        skipped = part.start - held[0][0] if held else 0
        yield part, table.slice(skipped, None if part.stop == END else part.stop - part.start)


def _parquet(shard: Shard) -> Any:
    """Return the opened Parquet file; checksums of pages are verified where it has them."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        ranged_reads.ExactFile(shard.url, shard.size),
        metadata=_footer(shard),
        pre_buffer=True,
        page_checksum_verification=True,
    )


@lru_cache(maxsize=256)
def _footer(shard: Shard) -> Any:
    """Return the metadata at a shard's end: every block of the shard needs it."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(ranged_reads.ExactFile(shard.url, shard.size))


def _row_groups(file: Any, parts: Sequence[Part]) -> Iterator[tuple[int, Any]]:
    """Yield (first row, batch) of the row groups that parts lie in, each group once, those of a part at a time."""
    about, done = file.metadata, 0
    edges = [
        0,
        *itertools.accumulate(
            about.row_group(number).num_rows for number in range(about.num_row_groups)
        ),
    ]
    for part in parts:
        stop = edges[-1] if part.stop == END else part.stop
        groups = [
            number
            for number in range(done, about.num_row_groups)
            if edges[number] < stop and edges[number + 1] > part.start
        ]
        if not groups:
            continue
        first, done = edges[groups[0]], groups[-1] + 1
        for batch in file.iter_batches(BATCH_ROWS, row_groups=groups):
            yield first, batch
            first += len(batch)


def _arrow(shard: Shard) -> tuple[Any, bool]:
    """Return the opened Arrow file, and whether it is of the file format (or of the stream format)."""
    import io

    import pyarrow.ipc

    raw = io.BufferedReader(ranged_reads.RangeFile(shard.url, shard.size), ranged_reads.RANGE_BYTES)
    is_file = raw.peek(6)[:6] == b"ARROW1"
    return (pyarrow.ipc.open_file(raw) if is_file else pyarrow.ipc.open_stream(raw)), is_file


def _record_batches(reader: Any, is_file: bool) -> Iterator[tuple[int, Any]]:
    """Yield (first row, record batch) of an Arrow file."""
    first = 0
    for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
        yield first, batch
        first += len(batch)


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
        raise DataError(
            redact(
                f"{shard.url}: is not {shard.kind.capitalize()} that can be read ({first}); write the "
                "shard again"
            )
        ) from error
