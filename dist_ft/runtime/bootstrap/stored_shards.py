"""The table of a streamed run's shards: listed once, stored with the run, copied to each node."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dist_ft.core import scratch
from dist_ft.core.errors import DataError
from dist_ft.data.sources.discovery import Shard
from dist_ft.data.sources.shard_table import ShardTable, check_table, write_table
from dist_ft.storage import local_files
from dist_ft.storage.filesystem import Store

SUFFIX = ".arrow"


def write_shards(shards_by_source: Iterable[Iterable[Shard]], folder: Path) -> str:
    """Write the table of a listing into a node's folder; return its checksum."""
    with scratch.new_file(folder / "listing") as temporary:
        write_table(temporary.path, shards_by_source)
        checksum = _checksum(temporary.path)
        temporary.path.rename(folder / f"{checksum}{SUFFIX}")
    return checksum


def store_shards(store: Store, name: str, folder: Path, checksum: str) -> None:
    """Store a table with the run, as `<name>.arrow`."""
    store.write(f"{name}{SUFFIX}", (folder / f"{checksum}{SUFFIX}").read_bytes())


def open_shards(store: Store, name: str, folder: Path, checksum: str) -> ShardTable:
    """Return the table with this checksum; one process of a node copies it from the run.

    Raises:
        DataError: the stored table is damaged or missing.
    """
    path = folder / f"{checksum}{SUFFIX}"
    with local_files.file_lock(str(path.with_suffix(".lock"))):
        if not path.exists():
            _copy(store, name, path, checksum)
    return ShardTable(path)


def _copy(store: Store, name: str, path: Path, checksum: str) -> None:
    folder_name, _, file_name = f"{name}{SUFFIX}".rpartition("/")
    with scratch.folder_next_to(path, "shards") as temporary:
        names = store.child(folder_name).download(str(temporary), lambda found: found == file_name)
        copied = temporary / file_name
        if not names or _checksum(copied) != checksum:
            problem = "is damaged (its checksum differs)" if names else "is missing"
            url = store.redacted_url(f"{name}{SUFFIX}")
            raise DataError(
                f"{url}: the table of the run's shards {problem}. Restore it from a copy; without "
                "it the run cannot continue."
            )
        check_table(copied)
        copied.rename(path)


def _checksum(path: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
