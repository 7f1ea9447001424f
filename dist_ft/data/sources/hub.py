"""Hugging Face data sets as shards of 10,000 rows.

Rows are read by index from the library's own local Arrow files (map-style), never streamed: streaming loses and
repeats rows on resume. A part is named by a URL that says everything needed to read it again. Does not run code that
comes with a data set.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact

ROWS_PER_SHARD = 10_000
BYTES_PER_SHARD = 16 * 2**20
"""What a part counts for: its text is not measured."""


def parts(path: str, subset: str | None, split: str, where: str) -> list[tuple[str, int, str]]:
    """Return (URL, number of rows, version) of every part of a data set; `where` is how errors name it."""
    data, version = _named(path, subset, split, where)
    if not len(data):
        raise DataError(f"{where}: the split {split} holds no row; choose another split")
    found = []
    for start in range(0, len(data), ROWS_PER_SHARD):
        stop = min(start + ROWS_PER_SHARD, len(data))
        query = urlencode(
            {"subset": subset or "", "split": split, "start": f"{start:09d}", "stop": f"{stop:09d}"}
        )
        found.append((f"hub://{path}?{query}", stop - start, version))
    return found


def read(url: str) -> list[dict[str, Any]]:
    """Return the rows of a part, in order."""
    address = urlsplit(url)
    query = dict(parse_qsl(address.query, keep_blank_values=True))
    data, _ = _named(address.netloc + address.path, query["subset"] or None, query["split"], url)
    return data.select(range(int(query["start"]), int(query["stop"]))).to_list()


def _named(path: str, subset: str | None, split: str, where: str) -> tuple[Any, str]:
    """As `_load`, with every failure one `DataError` that begins with `where`."""
    try:
        return _load(path, subset, split)
    except Exception as error:  # the library raises many kinds, of its own and of its HTTP clients
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            redact(
                f"{where}: can not be loaded as a Hugging Face data set ({type(error).__name__}: {first}); a public name, "
                "or HF_TOKEN for a gated one, with subset and split that exist is needed; if a local path was meant, "
                "there is none of this name"
            )
        ) from error


@lru_cache(maxsize=4)
def _load(path: str, subset: str | None, split: str) -> tuple[Any, str]:
    """Fetch a data set once into the library's cache; return it and a version made of the files behind it."""
    import datasets

    builder = datasets.load_dataset_builder(path, subset)
    builder.download_and_prepare()
    data = builder.as_dataset(split=split)
    return data, f"{builder.config.version}-{builder.hash or ''}-{len(data)}"
