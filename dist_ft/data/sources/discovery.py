"""Sources to shards.

A shard is one file behind any fsspec URL, or 10,000 rows of a Hugging Face data set. Guarantees: the same sources give
the same shards in the same order on every machine, each with a version by which a change is noticed. Reads no rows.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError, StorageError
from dist_ft.core.logs import redact
from dist_ft.data.sources import hub
from dist_ft.storage import filesystem

Row = dict[str, Any]
Kind = Literal["jsonl", "parquet", "arrow", "csv", "text", "hub"]

KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}
_ENCODED: tuple[Kind, ...] = ("jsonl", "csv")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ALLOWED = (
    ".jsonl, .json, .parquet, .arrow, .csv, .txt or .text (.jsonl, .json and .csv also .gz or .zst)"
)


@dataclass(frozen=True)
class Shard:
    """One piece of a data set.

    Attributes:
        url: where it lies; `hub://...` for a part of a Hugging Face data set.
        kind: how it is read.
        size: bytes of the file; rows of a hub shard.
        version: changes when the content may have (ETag, checksum or modification time).
    """

    url: str
    kind: Kind
    size: int
    version: str

    @property
    def codec(self) -> str | None:
        """How the file is compressed: gzip, zstd, or None."""
        return next(
            (name for suffix, name in CODECS.items() if self.url.lower().endswith(suffix)), None
        )


def row_error(shard_url: str, row: int, problem: str) -> DataError:
    """Return the error for a row that can not be used; `row` counts from 1, without blank lines."""
    return DataError(redact(f"{shard_url} row {row}: {problem}"))


def resolve(sources: Sequence[Source], field: str = "data.train") -> tuple[tuple[Shard, ...], ...]:
    """Return the shards of each of `sources`, sorted by URL.

    Raises:
        DataError: a source that names nothing, an unknown suffix, an empty file, a shard named twice. `field` is the
            config field the text names.
    """
    found_all: list[tuple[Shard, ...]] = []
    for source in sources:
        where = f"{field}={redact(source.path)}"
        if redact(source.path) != source.path:
            raise DataError(
                f"{where}: holds a credential; none may stand in a config; set it in the environment"
            )
        if is_hub_name(source.path):
            found = hub.parts(source.path, source.subset, source.split, where)
            found_all.append(
                tuple(Shard(url, "hub", rows, version) for url, rows, version in found)
            )
        else:
            found_all.append(
                tuple(_file_shard(*found, where) for found in _files(source.path, where))
            )
    _refuse_twice([shard for shards in found_all for shard in shards], field)
    return tuple(found_all)


def is_hub_name(path: str) -> bool:
    """Tell whether `path` names a Hugging Face data set: `name` or `org/name`, nothing of a folder here, no shard."""
    first = path.split("/", 1)[0]
    here = os.path.exists(first if "/" in path else path)
    return bool(_HUB_NAME.fullmatch(path)) and not here and _kind(path) is None


def require_unchanged(shard: Shard) -> None:
    """Refuse a shard that vanished or changed since it was resolved.

    Raises:
        DataError: names it and says which.
    """
    if shard.kind == "hub":
        return
    try:
        now = filesystem.stat(shard.url)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise vanished(shard) from error
        raise
    if now != {"size": shard.size, "version": shard.version}:
        raise DataError(
            redact(
                f"{shard.url}: the shard changed after the data was listed; shards may not be rewritten "
                "while a run uses them; start again once it is whole"
            )
        )


def vanished(shard: Shard) -> DataError:
    """Return the error for a shard that is gone."""
    return DataError(
        redact(
            f"{shard.url}: the shard vanished after the data was listed; shards may not be removed "
            "while a run uses them; put it back, or start a new run without it"
        )
    )


def _kind(path: str) -> Kind | None:
    """Return the kind of a file by its suffix."""
    name = posixpath.basename(path).lower()
    codec = next((suffix for suffix in CODECS if name.endswith(suffix)), "")
    kind = next(
        (kind for suffix, kind in KINDS.items() if name.removesuffix(codec).endswith(suffix)), None
    )
    return kind if not codec or kind in _ENCODED else None


def _files(path: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (URL, {size, version}) of a file, a glob or a folder (of which files of other kinds are left aside)."""
    about = filesystem.glob(path)
    found = [url for url in about if not posixpath.basename(url).startswith((".", "_"))]
    if not found:
        raise DataError(
            f"{where}: matches no file; a file, folder, glob or URL of {_ALLOWED} shards is needed, or "
            "the name of a Hugging Face data set; check the path"
        )
    known = [url for url in found if _kind(url) is not None]
    is_folder = _kind(path) is None and not any(char in path for char in "*?[")
    if not known or (len(known) < len(found) and not is_folder):
        unknown = next(url for url in found if _kind(url) is None)
        raise DataError(
            f"{where}: the kind of {redact(unknown)} is not known by its suffix; allowed are {_ALLOWED}; "
            "rename or convert it, or write a glob that leaves it out"
        )
    return [(url, about[url]) for url in known]


def _file_shard(url: str, about: dict[str, Any], where: str) -> Shard:
    if not about["size"]:
        raise DataError(
            f"{where}: the shard {redact(url)} is empty; each must hold a row; remove or fill it"
        )
    kind = _kind(url)
    assert kind is not None
    return Shard(url, kind, about["size"], about["version"])


def _refuse_twice(shards: Sequence[Shard], field: str) -> None:
    seen: set[str] = set()
    for shard in shards:
        if shard.url in seen:
            raise DataError(
                f"{field}: the shard {shard.url} is named twice; each sample counts once an epoch; remove "
                "the source that overlaps"
            )
        seen.add(shard.url)
