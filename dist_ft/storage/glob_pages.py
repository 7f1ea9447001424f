"""Listings of files in pages, so that a million of them need not be in memory at once."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from dist_ft.storage import filesystem, listing, s3_pages
from dist_ft.storage.listing import FileInfo
from dist_ft.storage.s3_pages import S3Object

_S3 = ("s3://", "s3a://")


def iter_glob(url: str) -> Iterator[dict[str, FileInfo]]:
    """Yield what `filesystem.glob` returns, in the same order, in several parts.

    Raises:
        StorageError: the storage does not respond, or refuses.
    """
    found_any = False
    if url.startswith(_S3) and "::" not in url:
        for page in _s3_pages(url):
            found_any = True
            yield page

    # Other stores; also one S3 object, and a name that has wildcard characters itself.
    if not found_any:
        yield filesystem.glob(url)


def _s3_pages(url: str) -> Iterator[dict[str, FileInfo]]:
    """Yield the files below a folder, or that match a pattern."""
    fs, path = filesystem.filesystem(url)
    bucket, _, key_path = path.partition("/")
    prefix = f"{key_path.rstrip('/')}/" if key_path else ""
    is_pattern = listing.is_pattern(path)
    if is_pattern:
        first_wildcard = min(key_path.find(char) % (len(key_path) + 1) for char in "*?[")
        prefix = key_path[:first_wildcard]

    def list_page(prefix: str, after: str, count: int) -> list[S3Object]:
        # each page is retried by itself
        return filesystem.attempt(
            "list", url, lambda fs, _: s3_pages.list_page(fs, bucket, prefix, after, count)
        )

    for page in s3_pages.iter_objects(list_page, prefix):
        infos: dict[str, FileInfo] = {}
        for item in page:
            name = f"{bucket}/{item.key}"
            # object stores may list the empty object that marks a folder
            is_file = not item.key.endswith("/") and listing.is_visible(posixpath.basename(name))
            if is_file and (not is_pattern or listing.matches(name, path)):
                infos[fs.unstrip_protocol(name)] = {"size": item.size, "version": item.etag}
        if infos:
            yield infos
