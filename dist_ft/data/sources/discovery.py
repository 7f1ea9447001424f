"""Find the shards of data sources.

A shard is one file behind any fsspec URL, or 10,000 rows of a Hugging Face dataset. Guarantees: the
same sources give the same shards in the same order on every machine. Each shard has a version, by
which a later change is noticed. No rows are read here.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line, shorten
from dist_ft.core.redaction import holds_secret
from dist_ft.data.sources import hub
from dist_ft.storage import filesystem

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
    shards_of_sources: list[tuple[Shard, ...]] = []
    for source in sources:
        field_value = f"{field}={printable_line(redact(source.path))}"

        # URLs are stored in the index of the run.
        if holds_secret(source.path):
            raise DataError(
                f"{field_value}: holds a credential. Credentials are not allowed in a config. Set "
                "it in the environment."
            )

        if is_hub_name(source.path):
            shards = _hub_shards(source, field_value)
        else:
            shards = _file_shards(source.path, field_value)

        shards_of_sources.append(shards)

    # over all sources: globs of two of them may overlap
    _refuse_duplicates([shard for shards in shards_of_sources for shard in shards], field)
    return tuple(shards_of_sources)


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


def _file_shards(path: str, field_value: str) -> tuple[Shard, ...]:
    """Return the shards of a file, glob or folder; other files of a folder are ignored."""
    # names that start so are of metadata: _SUCCESS, _complete, .part files
    listing = filesystem.glob(path)
    urls = [url for url in listing if not posixpath.basename(url).startswith((".", "_"))]
    if not urls:
        raise DataError(
            f"{field_value}: matches no file. It must be a file, folder, glob or URL of "
            f"{_ALLOWED_SUFFIXES} shards, or the name of a Hugging Face dataset. Check the path."
        )

    # A folder may hold a README next to its shards. A glob names each file, so that an unknown one
    # is a mistake.
    unknown = [url for url in urls if _kind_by_suffix(url) is None]
    is_glob = any(char in path for char in "*?[")
    is_folder = _kind_by_suffix(path) is None and not is_glob
    if len(unknown) == len(urls) or (unknown and not is_folder):
        raise DataError(
            f"{field_value}: {printable_line(redact(unknown[0]))} has an unknown suffix. Allowed "
            f"are {_ALLOWED_SUFFIXES}. Rename or convert the file, or write a glob that excludes "
            "it."
        )

    shards = []
    for url in urls:
        kind = _kind_by_suffix(url)
        if kind is None:
            continue

        name = printable_line(redact(url))
        if not _is_utf8(url):
            raise DataError(
                f"{field_value}: the name of the shard {name} is not UTF-8. Indexes and ledgers "
                "store names as text. Rename it."
            )
        if not listing[url]["size"]:
            raise DataError(
                f"{field_value}: the shard {name} is empty. Each shard must hold at least one row. "
                "Remove or fill it."
            )

        shards.append(Shard(url, kind, listing[url]["size"], listing[url]["version"]))

    return tuple(shards)


def _is_utf8(name: str) -> bool:
    """Return whether a name is text: Python stands for other bytes by lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_duplicates(shards: Sequence[Shard], field: str) -> None:
    """Refuse a shard that two sources contain."""
    urls: set[str] = set()
    for shard in shards:
        if shard.url in urls:
            raise DataError(
                f"{field}: the shard {printable_line(shard.url)} is listed twice. Each sample "
                "counts once per epoch. Remove the source that overlaps."
            )

        urls.add(shard.url)
