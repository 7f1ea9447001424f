"""An S3 server on loopback whose objects need no disk: bytes follow from key and range.

    python tests/benchmarks/virtual_bucket.py PORT FOLDER

Bucket `virtual` holds `SUFFIX/SIZE/part-N.SUFFIX` for any total SIZE in bytes: JSON Lines repeat the lines
of FOLDER/rows.jsonl up to the size, Parquet shards
are all FOLDER/rows.parquet (FOLDER/small.parquet in data sets smaller than that). `list/COUNT/` holds
COUNT keys that can only be listed. Supports GET with a
range, HEAD, and listings with pages. `GET /counts` returns and resets what was requested: kind ->
[requests, bytes].
"""

from __future__ import annotations

import json
import re
import sys
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlparse
from xml.sax.saxutils import escape

BUCKET = "virtual"
SHARD_BYTES = 25_000_000
PAGE = 1000
_KEY = re.compile(r"(jsonl|parquet)/(\d+)/part-(\d+)\.\1")


class Bucket:
    """The objects.

    Attributes:
        lines: content that JSON Lines shards repeat; ends with a line break.
        parquet: content of every Parquet shard.
        small_parquet: that of smaller data sets.
    """

    def __init__(self, folder: Path) -> None:
        self.lines = (folder / "rows.jsonl").read_bytes()
        self.parquet = (folder / "rows.parquet").read_bytes()
        self.small_parquet = (folder / "small.parquet").read_bytes()

        self.sizes = lru_cache(16)(self._sizes)

    def _sizes(self, total: int, suffix: str) -> dict[str, int]:
        """Return the bytes of each shard of a data set of `total` bytes, by key in order."""
        if suffix == "parquet":
            content = self._parquet_of(total)
            sizes = [len(content)] * max(1, round(total / len(content)))
        else:
            # whole repetitions only, so that every shard ends with a line
            repetitions = max(1, round(total / len(self.lines)))
            per_shard = max(1, SHARD_BYTES // len(self.lines))
            sizes = []
            while repetitions:
                sizes.append(min(per_shard, repetitions) * len(self.lines))
                repetitions -= min(per_shard, repetitions)
        return {f"{suffix}/{total}/part-{n:07d}.{suffix}": size for n, size in enumerate(sizes)}

    def _parquet_of(self, total: int) -> bytes:
        return self.small_parquet if total < len(self.parquet) else self.parquet

    def read(self, total: int, suffix: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop) of a shard of a data set of `total` bytes."""
        if suffix == "parquet":
            return self._parquet_of(total)[start:stop]
        offset = start % len(self.lines)
        count = -(-(offset + stop - start) // len(self.lines))
        return (self.lines * count)[offset : offset + stop - start]


class ListedKeys(Sequence[str]):
    """The keys of `list/COUNT/`, in order, which take no memory."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        return f"list/{self._count}/part-{number:07d}.jsonl"


class Handler(BaseHTTPRequestHandler):
    """Answers requests."""

    protocol_version = "HTTP/1.1"
    bucket: ClassVar[Bucket]
    counts: ClassVar[dict[str, list[int]]] = defaultdict(lambda: [0, 0])
    lock: ClassVar[Lock] = Lock()

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        """Answer with the size of an object."""
        self._object(has_body=False)

    def do_GET(self) -> None:
        """Answer with counts, a listing or an object."""
        url = urlparse(self.path)
        if url.path == "/counts":
            with self.lock:
                content = json.dumps(self.counts).encode()
                self.counts.clear()
            self._answer(200, content, "application/json")
        elif url.path.strip("/") == BUCKET:
            self._listing(parse_qs(url.query))
        else:
            self._object(has_body=True)

    def _count(self, kind: str, num_bytes: int) -> None:
        with self.lock:
            self.counts[kind][0] += 1
            self.counts[kind][1] += num_bytes

    def _listing(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        most = int(query.get("max-keys", [str(PAGE)])[0])
        match = re.match(r"(jsonl|parquet|list)/(\d+)/", prefix)
        self._count("list", 0)
        keys: Sequence[str] = []
        sizes: dict[str, int] = {}
        if match and match[1] == "list":
            keys = ListedKeys(int(match[2]))
        elif match:
            sizes = self.bucket.sizes(int(match[2]), match[1])
            keys = list(sizes)

        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        first = max(bisect_left(keys, prefix), bisect_right(keys, after))
        stop = bisect_left(keys, prefix + "\U0010ffff")
        page = [(keys[n], sizes.get(keys[n], 1000)) for n in range(first, min(stop, first + most))]
        rest = stop > first + most
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z"
            f"</LastModified><ETag>&quot;{size:x}&quot;</ETag><Size>{size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for key, size in page
        )
        token = f"<NextContinuationToken>{page[-1][0]}</NextContinuationToken>" if rest else ""
        text = (
            '<?xml version="1.0"?><ListBucketResult '
            'xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<MaxKeys>{PAGE}</MaxKeys><IsTruncated>{'true' if rest else 'false'}</IsTruncated>"
            f"{token}{entries}</ListBucketResult>"
        )
        self._answer(200, text.encode(), "application/xml")

    def _object(self, has_body: bool) -> None:
        key = unquote(urlparse(self.path).path).strip("/").removeprefix(f"{BUCKET}/")
        match = _KEY.fullmatch(key)
        sizes = self.bucket.sizes(int(match[2]), match[1]) if match else {}
        if key not in sizes or match is None:
            self._count("missing", 0)
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>" if has_body else b"")
            return

        size = sizes[key]
        start, stop = 0, size
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if requested:
            start = int(requested[1])
            stop = min(size, int(requested[2]) + 1) if requested[2] else size

        content = self.bucket.read(int(match[2]), match[1], start, stop) if has_body else b""
        self._count("GET" if has_body else "HEAD", len(content))
        self.send_response(206 if requested else 200)
        self.send_header("ETag", f'"{size:x}"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("Content-Length", str(stop - start))
        if requested:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, status: int, content: bytes, kind: str = "application/xml") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def main() -> None:
    """Serve until the process is ended."""
    Handler.bucket = Bucket(Path(sys.argv[2]))
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
