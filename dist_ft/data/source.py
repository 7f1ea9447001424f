"""Sources to shards, and shards to rows.

A shard is the unit that is read, tokenised and cached whole: a .jsonl (also .json, .jsonl.gz), .parquet or .txt file
behind any fsspec URL, or 10,000 rows of a Hugging Face data set. Guarantees: the same sources give the same shards in
the same order on every machine; what is read is the version that was resolved, or one `DataError` says otherwise.
Does not interpret columns, and does not list a glob again once shards are known.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dist_ft import storage
from dist_ft.config.schema import Source
from dist_ft.data import hub
from dist_ft.errors import DataError, StorageError
from dist_ft.logs import redact

Row = dict[str, Any]
Kind = Literal["jsonl", "parquet", "text", "hub"]

KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".json": "jsonl", ".jsonl.gz": "jsonl", ".json.gz": "jsonl",
                          ".parquet": "parquet", ".txt": "text", ".text": "text"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_ALLOWED = ".jsonl, .json, .jsonl.gz, .parquet, .txt or .text"


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


def row_error(shard_url: str, row: int, problem: str) -> DataError:
    """Return the error for a row that can not be used; `row` counts from 1, without blank lines."""
    return DataError(redact(f"{shard_url} row {row}: {problem}"))


def resolve(sources: Sequence[Source], field: str = "data.train") -> tuple[Shard, ...]:
    """Return the shards of `sources`: in the order of the sources, sorted by URL within each.

    Raises:
        DataError: a source that names nothing, an unknown suffix, an empty file, a shard named twice. `field` is the
            config field the text names.
    """
    shards: list[Shard] = []
    for source in sources:
        where = f"{field}={redact(source.path)}"
        if redact(source.path) != source.path:
            raise DataError(f"{where}: holds a credential; none may stand in a config; set it in the environment")
        if is_hub_name(source.path):
            found = hub.parts(source.path, source.subset, source.split, where)
            shards.extend(Shard(url, "hub", rows, version) for url, rows, version in found)
        else:
            shards.extend(_file_shard(url, where) for url in _files(source.path, where))
    _refuse_twice(shards, field)
    return tuple(shards)


def is_hub_name(path: str) -> bool:
    """Tell whether `path` names a Hugging Face data set: `name` or `org/name`, nothing of a folder here, no shard."""
    first = path.split("/", 1)[0]
    here = os.path.exists(first if "/" in path else path)
    return bool(_HUB_NAME.fullmatch(path)) and not here and _kind(path) is None


def read_rows(shard: Shard) -> list[Row]:
    """Return all rows of a shard, in order. A text shard is one row {"text": ...}: the whole file is one sample.

    Raises:
        DataError: the shard vanished or changed since it was resolved, or a row can not be read (text names both).
    """
    if shard.kind == "hub":
        return hub.read(shard.url)
    try:
        rows = _READERS[shard.kind](shard)
        changed = storage.stat(shard.url) != {"size": shard.size, "version": shard.version}
    except (StorageError, FileNotFoundError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise DataError(redact(f"{shard.url}: the shard vanished after the data was listed; shards may not be removed "
                               "while a run uses them; put it back, or start a new run without it")) from error
    if changed:
        raise DataError(redact(f"{shard.url}: the shard changed after the data was listed; shards may not be rewritten "
                               "while a run uses them; start again once it is whole"))
    return rows


def _kind(path: str) -> Kind | None:
    """Return the kind of a file by its suffix."""
    name = posixpath.basename(path).lower()
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def _files(path: str, where: str) -> list[str]:
    """Return the shard URLs of a file, a glob or a folder (of which files of other kinds are left aside)."""
    found = [url for url in storage.glob(path) if not posixpath.basename(url).startswith((".", "_"))]
    if not found:
        raise DataError(f"{where}: matches no file; a file, folder, glob or URL of {_ALLOWED} shards is needed, or "
                        "the name of a Hugging Face data set; check the path")
    known = [url for url in found if _kind(url) is not None]
    is_folder = _kind(path) is None and not any(char in path for char in "*?[")
    if not known or (len(known) < len(found) and not is_folder):
        unknown = next(url for url in found if _kind(url) is None)
        raise DataError(f"{where}: the kind of {redact(unknown)} is not known by its suffix; allowed are {_ALLOWED}; "
                        "rename or convert it, or write a glob that leaves it out")
    return known


def _file_shard(url: str, where: str) -> Shard:
    about = storage.stat(url)
    if not about["size"]:
        raise DataError(f"{where}: the shard {redact(url)} is empty; each must hold a row; remove or fill it")
    kind = _kind(url)
    assert kind is not None
    return Shard(url, kind, about["size"], about["version"])


def _refuse_twice(shards: Sequence[Shard], field: str) -> None:
    seen: set[str] = set()
    for shard in shards:
        if shard.url in seen:
            raise DataError(f"{field}: the shard {shard.url} is named twice; each sample counts once an epoch; remove "
                            "the source that overlaps")
        seen.add(shard.url)


def _read_bytes(shard: Shard) -> bytes:
    folder, name = posixpath.split(shard.url)
    content = storage.Store(folder).read(name)
    if not shard.url.lower().endswith(".gz"):
        return content
    import gzip
    import zlib

    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(redact(f"{shard.url}: is not whole gzip ({error}); write the shard again")) from error


def _read_text(shard: Shard) -> list[Row]:
    try:
        return [{"text": _read_bytes(shard).decode("utf-8-sig")}]
    except UnicodeDecodeError as error:
        raise DataError(redact(f"{shard.url}: byte {error.start} is not UTF-8; shards must be UTF-8; convert "
                               "it")) from error


def _read_jsonl(shard: Shard) -> list[Row]:
    lines: list[Any]
    content = _read_bytes(shard).removeprefix(b"\xef\xbb\xbf")
    if ".json" in shard.url.lower() and ".jsonl" not in shard.url.lower() and content.lstrip().startswith(b"["):
        lines = _json_array(shard, content)
    else:
        lines = [line for line in content.split(b"\n") if line.strip()]
    rows = [_json_row(shard, number, line) for number, line in enumerate(lines, 1)]
    if not rows:
        raise DataError(redact(f"{shard.url}: holds no row; each shard must hold one; remove or fill it"))
    return rows


def _json_array(shard: Shard, content: bytes) -> list[Any]:
    """Return the items of a .json file that is one array."""
    try:
        return list(json.loads(content))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(redact(f"{shard.url}: is not a JSON array ({error}); one object a line (.jsonl) is allowed "
                               "too; repair the file")) from error


def _json_row(shard: Shard, number: int, line: Any) -> Row:
    try:
        row = json.loads(line.decode("utf-8")) if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise row_error(shard.url, number, f"byte {error.start} of the line is not UTF-8; convert the shard") from error
    except json.JSONDecodeError as error:
        raise row_error(shard.url, number, f"is not JSON ({error.msg} at column {error.colno}); one object a line is "
                                           "needed; repair or remove the line") from error
    if not isinstance(row, dict):
        raise row_error(shard.url, number, f"is a {type(row).__name__}; an object with named fields is needed; "
                                           "repair or remove the line")
    return row


def _read_parquet(shard: Shard) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        filesystem, path = storage.arrow_filesystem(shard.url)
        table = pyarrow.parquet.read_table(path, filesystem=filesystem)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise DataError(redact(f"{shard.url}: is not Parquet that can be read ({first}); write the shard "
                               "again")) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(redact(f"{shard.url}: can not read it ({error}); check that the endpoint "
                                  "answers")) from error
    if not table.num_rows:
        raise DataError(redact(f"{shard.url}: holds no row; each shard must hold one; remove or fill it"))
    return table.to_pylist()


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
