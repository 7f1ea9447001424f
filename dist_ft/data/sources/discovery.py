"""Find the shards of data sources.

A shard is one file behind any fsspec URL, or 10,000 rows of a Hugging Face dataset. Guarantees: the
same sources give the same shards in the same order on every machine. Each shard has a version, by
which a later change is noticed. No rows are read here.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line, shorten
from dist_ft.core.redaction import holds_secret
from dist_ft.data.sources import hub
from dist_ft.storage import filesystem, glob_pages
from dist_ft.storage.listing import FileInfo

Row = dict[str, Any]
ShardKind = Literal["jsonl", "parquet", "arrow", "csv", "text", "hub"]

KIND_BY_SUFFIX: dict[str, ShardKind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}
CODEC_BY_SUFFIX = {".gz": "gzip", ".zst": "zstd"}
_COMPRESSIBLE_KINDS: tuple[ShardKind, ...] = ("jsonl", "csv")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ALLOWED_SUFFIXES = (
    ".jsonl, .json, .parquet, .arrow, .csv, .txt or .text (.jsonl, .json and .csv also .gz or .zst)"
)


@dataclass(frozen=True)
class Shard:
    """One file of a dataset, or one range of rows of a Hugging Face dataset.

    Attributes:
        url: where the shard is; `hub://...` for a range of a Hugging Face dataset.
        kind: the file format, which decides how the shard is read.
        size: bytes of the file; for a hub shard, its number of rows.
        version: changes when the content may have changed (ETag, checksum or modification time).
    """

    url: str
    kind: ShardKind
    size: int
    version: str

    @property
    def codec(self) -> str | None:
        """The compression of the file: gzip, zstd, or None."""
        for suffix, codec in CODEC_BY_SUFFIX.items():
            if self.url.lower().endswith(suffix):
                return codec
        return None


class Shards(Protocol):
    """The shards of a data set, by number."""

    def __getitem__(self, number: int, /) -> Shard:
        """Return a shard."""


class RowLocation(NamedTuple):
    """Where a row is; errors about the row name it.

    Attributes:
        shard_url: URL of the shard that holds the row.
        number: number of the row in its shard, from 1; blank lines do not count.
    """

    shard_url: str
    number: int

    def error(self, problem: str) -> DataError:
        """Return the error for a row that cannot be used."""
        # Values of the row may be long, and skipped rows keep their errors.
        line = redact(f"{printable_line(self.shard_url)} row {self.number}: {problem}")
        return DataError(shorten(line))


def discover_shards(
    sources: Sequence[Source], field: str = "data.train"
) -> tuple[tuple[Shard, ...], ...]:
    """Return the shards of each of `sources`, sorted by URL.

    Args:
        sources: the sources of a config section.
        field: the config field of the sources; errors name it.

    Raises:
        DataError: a source matches nothing, holds a credential or has an unknown suffix; a file is
            empty; or two sources contain the same shard.
    """
    return tuple(tuple(shards) for shards in iter_shards(sources, field))


def iter_shards(sources: Sequence[Source], field: str = "data.train") -> Iterator[Iterator[Shard]]:
    """Yield an iterator over the shards of each of `sources`, to be consumed in this order.

    Few shards are in memory at a time. Raises what `discover_shards` raises, where it is found.
    """
    # A listing names no file twice, but globs of two sources may overlap.
    seen = _SeenShards(field) if len(sources) > 1 else None
    for source in sources:
        shards = _shards_of(source, field)
        yield shards if seen is None else seen.check(shards)


def _shards_of(source: Source, field: str) -> Iterator[Shard]:
    field_value = f"{field}={printable_line(redact(source.path))}"

    # URLs are stored in the index of the run.
    if holds_secret(source.path):
        raise DataError(
            f"{field_value}: holds a credential. Credentials are not allowed in a config. Set it "
            "in the environment."
        )

    if is_hub_name(source.path):
        yield from _hub_shards(source, field_value)
    else:
        yield from _file_shards(source.path, field_value)


def is_hub_name(path: str) -> bool:
    """Return whether `path` names a Hugging Face dataset.

    Such a name is `name` or `org/name`. It has no suffix of a shard, and there is no local folder
    of this name.
    """
    # `data/mine` with a misspelled file name is meant as a path, as the folder `data` exists
    top_folder = path.split("/", 1)[0]
    return (
        bool(_HUB_NAME.fullmatch(path))
        and not os.path.exists(top_folder)
        and _kind_by_suffix(path) is None
    )


def require_unchanged(shard: Shard) -> None:
    """Refuse a shard that was removed or changed since discovery.

    Raises:
        DataError: names the shard and says which of the two happened.
    """
    # read from the library's local Arrow files, which nothing changes
    if shard.kind == "hub":
        return

    try:
        current = filesystem.stat(shard.url)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise vanished_error(shard) from error
        raise  # storage that does not answer says nothing about the shard

    if current != {"size": shard.size, "version": shard.version}:
        raise DataError(
            redact(
                f"{shard.url}: the shard changed after the data was listed. Shards must not be "
                "rewritten while a run uses them. Start again when the shard is complete."
            )
        )


def vanished_error(shard: Shard) -> DataError:
    """Return the error for a shard that no longer exists."""
    return DataError(
        redact(
            f"{shard.url}: the shard vanished after the data was listed. Shards must not be "
            "removed while a run uses them. Put the shard back, or start a new run without it."
        )
    )


def _kind_by_suffix(path: str) -> ShardKind | None:
    """Return the kind of a file by its suffix; None if the suffix is unknown."""
    name = posixpath.basename(path).lower()
    is_compressed = False
    for suffix in CODEC_BY_SUFFIX:
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            is_compressed = True
            break

    for suffix, kind in KIND_BY_SUFFIX.items():
        if name.endswith(suffix):
            if is_compressed and kind not in _COMPRESSIBLE_KINDS:
                return None
            return kind

    return None


def _hub_shards(source: Source, field_value: str) -> tuple[Shard, ...]:
    """Return the shards of a Hugging Face dataset."""
    row_ranges = hub.list_row_ranges(source.path, source.subset, source.split, field_value)
    return tuple(Shard(found.url, "hub", found.num_rows, found.version) for found in row_ranges)


def _file_shards(path: str, field_value: str) -> Iterator[Shard]:
    """Yield the shards of a file, glob or folder; other files of a folder are ignored."""
    is_glob = any(char in path for char in "*?[")
    is_folder = _kind_by_suffix(path) is None and not is_glob
    first_unknown = ""
    found_any = False

    for page in glob_pages.iter_glob(path):
        for url, info in page.items():
            # names that start so are of metadata: _SUCCESS, _complete, .part files
            if posixpath.basename(url).startswith((".", "_")):
                continue

            # A folder may hold a README next to its shards. A glob names each file, so that an
            # unknown one is a mistake.
            kind = _kind_by_suffix(url)
            if kind is None:
                first_unknown = first_unknown or url
                if not is_folder:
                    raise _unknown_suffix(url, field_value)
                continue

            found_any = True
            yield _file_shard(url, kind, info, field_value)

    if first_unknown and not found_any:
        raise _unknown_suffix(first_unknown, field_value)
    if not found_any:
        raise DataError(
            f"{field_value}: matches no file. It must be a file, folder, glob or URL of "
            f"{_ALLOWED_SUFFIXES} shards, or the name of a Hugging Face dataset. Check the path."
        )


def _file_shard(url: str, kind: ShardKind, info: FileInfo, field_value: str) -> Shard:
    if not _is_utf8(url):
        raise DataError(
            f"{field_value}: the name of the shard {printable_line(redact(url))} is not UTF-8. "
            "Indexes and ledgers store names as text. Rename it."
        )
    if not info["size"]:
        raise DataError(
            f"{field_value}: the shard {printable_line(redact(url))} is empty. Each shard must "
            "hold at least one row. Remove or fill it."
        )
    return Shard(url, kind, info["size"], info["version"])


def _unknown_suffix(url: str, field_value: str) -> DataError:
    return DataError(
        f"{field_value}: {printable_line(redact(url))} has an unknown suffix. Allowed are "
        f"{_ALLOWED_SUFFIXES}. Rename or convert the file, or write a glob that excludes it."
    )


def _is_utf8(name: str) -> bool:
    """Return whether a name is text: Python stands for other bytes by lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _SeenShards:
    """The shards of several sources so far, as checksums of their URLs."""

    def __init__(self, field: str) -> None:
        self._field = field
        self._checksums: set[int] = set()

    def check(self, shards: Iterator[Shard]) -> Iterator[Shard]:
        """Yield shards; refuse one that a source before contains."""
        import xxhash

        for shard in shards:
            checksum = xxhash.xxh3_64_intdigest(shard.url.encode())
            if checksum in self._checksums:
                raise DataError(
                    f"{self._field}: the shard {printable_line(shard.url)} is listed twice. Each "
                    "sample counts once per epoch. Remove the source that overlaps."
                )
            self._checksums.add(checksum)
            yield shard
