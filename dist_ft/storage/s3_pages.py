"""Listings of an S3 prefix page by page, several pages in flight, in the order of the keys.

A prefix may hold a million objects: listed in turn, they are a thousand requests, each of which
needs the answer of the one before. So the range of keys is split: all its keys start alike, and the
characters that follow divide it into parts that are listed at the same time. Memory is bounded by
the pages in flight. Does not retry (the caller does, page by page).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

PAGE_KEYS = 1000
MAX_IN_FLIGHT = 8
MAX_PAGES_IN_TURN = 16
"""Listings of up to this many pages are not split."""
AFTER_ALL = "\U0010ffff"
"""Sorts after every character of a key."""


class S3Object(NamedTuple):
    """An object in a listing.

    Attributes:
        key: its key in the bucket.
        size: bytes.
        etag: its ETag, as the store wrote it.
    """

    key: str
    size: int
    etag: str


ListPage = Callable[[str, str, int], list[S3Object]]
"""(prefix, start after this key, number of keys) -> the next objects, in order."""


def iter_objects(list_page: ListPage, prefix: str) -> Iterator[list[S3Object]]:
    """Yield the objects below a prefix in pages, in the order of their keys."""
    # Splitting takes some 250 requests, so a small listing is read in turn.
    pages: list[list[S3Object]] = []
    after = ""
    while len(pages) < MAX_PAGES_IN_TURN:
        page = list_page(prefix, after, PAGE_KEYS)
        pages.append(page)
        if len(page) < PAGE_KEYS:
            yield from filter(None, pages)
            return
        after = page[-1].key
    pages.clear()

    with ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="dist_ft-list") as threads:
        waiting = deque(_split(list_page, prefix, threads))
        running: deque[Future[list[list[S3Object]]]] = deque()

        # Pages of a part wait until those of the parts before are consumed.
        while running or waiting:
            while waiting and len(running) < MAX_IN_FLIGHT:
                running.append(threads.submit(_list_part, list_page, waiting.popleft()))
            yield from running.popleft().result()


def _list_part(list_page: ListPage, prefix: str) -> list[list[S3Object]]:
    """Return all pages of a part."""
    pages = []
    after = ""
    while True:
        page = list_page(prefix, after, PAGE_KEYS)
        if page:
            pages.append(page)
        if len(page) < PAGE_KEYS:
            return pages
        after = page[-1].key


def _split(list_page: ListPage, prefix: str, threads: ThreadPoolExecutor) -> list[str]:
    """Return prefixes, in order, that divide the keys below `prefix` into parts."""
    parts = [prefix]
    while len(parts) < 2 * MAX_IN_FLIGHT:
        divided = list(threads.map(lambda part: _divide(list_page, part), parts))
        new_parts = [part for own in divided for part in own]
        if new_parts == parts:
            break
        parts = new_parts
    return parts


def _divide(list_page: ListPage, prefix: str) -> list[str]:
    """Return the prefixes with one more character that have keys; [prefix] for a small part."""
    page = list_page(prefix, "", PAGE_KEYS)
    if len(page) < PAGE_KEYS:
        return [prefix]

    shared = _common_prefix(list_page, prefix, page[0].key)
    if page[0].key == shared:
        return [prefix]  # a key that ends here would be in none of the parts

    parts = []
    found = page[:1]
    while found:
        part = found[0].key[: len(shared) + 1]
        parts.append(part)
        found = list_page(shared, part + AFTER_ALL, 1)
    return parts


def _common_prefix(list_page: ListPage, prefix: str, first_key: str) -> str:
    """Return the longest start of `first_key`, the first key below `prefix`, that all share."""
    low, high = len(prefix), len(first_key)
    while low < high:
        middle = (low + high + 1) // 2
        shared = first_key[:middle]
        # keys are in order, so those that do not start so come after all that do
        if list_page(prefix, shared + AFTER_ALL, 1):
            high = middle - 1
        else:
            low = middle
    return first_key[:low]


def list_page(filesystem: Any, bucket: str, prefix: str, after: str, count: int) -> list[S3Object]:
    """Return the next objects of a bucket, in order; `filesystem`: of s3fs."""
    options = {"StartAfter": after} if after else {}
    answer = filesystem.call_s3(
        "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=count, **options
    )
    return [
        S3Object(item["Key"], int(item["Size"]), str(item["ETag"]))
        for item in answer.get("Contents", [])
    ]
