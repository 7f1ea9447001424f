"""Hugging Face datasets as shards of 10,000 rows.

Rows are read by index from the library's own local Arrow files (map-style), never streamed:
streaming loses and repeats rows on resume. The URL of a shard holds everything needed to read its
rows again. Code that comes with a dataset is not run, and its card names no files but its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact

ROWS_PER_SHARD = 10_000
BYTES_PER_SHARD = 16 * 2**20
"""The nominal size of a shard; its text is not measured."""
_loading = Lock()


class RowRange(NamedTuple):
    """Consecutive rows of one split of a dataset.

    Attributes:
        url: names dataset, subset, split and rows.
        num_rows: number of rows.
        version: version of the dataset.
    """

    url: str
    num_rows: int
    version: str


class _LoadedDataset(NamedTuple):
    """A dataset of the `datasets` library, and a version derived from its files."""

    rows: Any
    version: str


def list_row_ranges(path: str, subset: str | None, split: str, field_value: str) -> list[RowRange]:
    """Return the row ranges of a dataset, in order; errors name it by `field_value`."""
    rows, version = _load_or_raise(path, subset, split, field_value)
    if not len(rows):
        raise DataError(f"{field_value}: the split {split} holds no row. Choose another split.")

    ranges = []
    for start in range(0, len(rows), ROWS_PER_SHARD):
        stop = min(start + ROWS_PER_SHARD, len(rows))
        # zero-padded, so that URLs sort in the order of the rows
        query = urlencode(
            {"subset": subset or "", "split": split, "start": f"{start:09d}", "stop": f"{stop:09d}"}
        )
        ranges.append(RowRange(f"hub://{path}?{query}", stop - start, version))

    return ranges


def read_rows(url: str) -> list[dict[str, Any]]:
    """Return the rows of a range, in order."""
    address = urlsplit(url)
    # blank values are kept: a dataset without subsets has subset=""
    query = dict(parse_qsl(address.query, keep_blank_values=True))
    name = address.netloc + address.path

    dataset = _load_or_raise(name, query["subset"] or None, query["split"], url)
    selected = range(int(query["start"]), int(query["stop"]))
    return dataset.rows.select(selected).to_list()


def _load_or_raise(path: str, subset: str | None, split: str, field_value: str) -> _LoadedDataset:
    """As `_load_dataset`, but every failure is one `DataError` that starts with `field_value`."""
    try:
        return _load_dataset(path, subset, split)
    except DataError:
        raise
    except Exception as error:  # the library raises many types, its own and those of HTTP clients
        first_line = (str(error).splitlines() or [""])[0]
        raise DataError(
            redact(
                f"{field_value}: cannot be loaded as a Hugging Face dataset "
                f"({type(error).__name__}: {first_line}). It must be public, or gated with "
                "HF_TOKEN set; its subset and split must exist. If you meant a local path: it "
                "does not exist. Check the name."
            )
        ) from error


@lru_cache(maxsize=4)
def _load_dataset(path: str, subset: str | None, split: str) -> _LoadedDataset:
    """Download a dataset once into the library's cache; its version is derived from its files."""
    import datasets

    # cached, as `read_rows` needs the dataset for each shard of 10,000 rows
    with _own_files_only(path):
        builder = datasets.load_dataset_builder(path, subset)
        builder.download_and_prepare()
    rows = builder.as_dataset(split=split)

    # The hash covers the data files, and the number of rows how the split cuts them.
    version = f"{builder.config.version}-{builder.hash or ''}-{len(rows)}"
    return _LoadedDataset(rows, version)


@contextmanager
def _own_files_only(path: str) -> Iterator[None]:
    """Refuse files of other places that a dataset's card (README.md) names as its data."""
    from datasets import data_files

    # The library reads any path and URL that a card names, with the credentials of this process,
    # and has no option against it. This function of it turns each of them into a list of files.
    resolve = data_files.resolve_pattern

    def resolve_own(pattern: str, base_path: str, *args: Any, **kwargs: Any) -> list[str]:
        if not _is_own_file(str(pattern), str(base_path), path):
            raise DataError(
                redact(
                    f"{path}: the dataset's card names {pattern}, which is no file of the dataset. "
                    "Only its own files are read. Set the config to that file itself if you trust "
                    "it, or use another dataset."
                )
            )
        return resolve(pattern, base_path, *args, **kwargs)

    # The function is the library's for the whole process, so one thread at a time replaces it.
    with _loading:
        data_files.resolve_pattern = resolve_own
        try:
            yield
        finally:
            data_files.resolve_pattern = resolve


def _is_own_file(pattern: str, base_path: str, path: str) -> bool:
    """Return whether a pattern of a dataset's card names files of the dataset at `base_path`."""
    from datasets import config

    # The library has resolved the name, so the base is `hf://datasets/<name>@<commit>`.
    is_base = base_path.startswith(("hf://datasets/", path, os.path.abspath(path)))
    has_parent = any(".." in text.replace("\\", "/").split("/") for text in (pattern, base_path))
    if not is_base or has_parent or "::" in pattern:
        return False
    if "://" not in pattern and not pattern.startswith(("/", "\\", "~")):
        return True

    # Files that the hub converted to Parquet are named in full.
    repository = base_path.partition("@")[0]
    name = repository.removeprefix("hf://datasets/")
    own = (f"{repository}@", f"{repository}/", f"{config.HF_ENDPOINT}/datasets/{name}/")
    return pattern.startswith(own)
