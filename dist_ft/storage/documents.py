"""Read JSON files of dist_ft, or what stands in their place: bounded, with one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_ft.core.errors import DocumentError
from dist_ft.core.json_documents import RESTORE, parse_json, parse_json_object
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.storage.filesystem import Store
from dist_ft.storage.local_files import read_regular

MAX_BYTES = 64 * 2**20
"""Bytes of a document. The largest, of runs with thousands of weights or labels, have a few MiB."""
MAX_LARGE_BYTES = 2 * 2**30
"""Bytes of a file that grows with the run: metrics and indexes."""


def read_json(store: Store, path: str, remedy: str = RESTORE, max_bytes: int = MAX_BYTES) -> Any:
    """Return the JSON value in a file of a store.

    Raises:
        DocumentError: not JSON, or beyond the bounds of `core.json_documents`.
        StorageError: it cannot be read, is not a regular file, or has more than `max_bytes`.
    """
    return parse_json(store.read_at_most(path, max_bytes), store.redacted_url(path), remedy)


def read_json_object(
    store: Store, path: str, remedy: str = RESTORE, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """As `read_json`, for a file that must hold one object."""
    content = store.read_at_most(path, max_bytes)
    return parse_json_object(content, store.redacted_url(path), remedy)


def read_json_texts(store: Store, path: str, remedy: str = RESTORE) -> tuple[str, ...]:
    """As `read_json`, for a file that must hold a list of texts, such as the labels of a run."""
    value = read_json(store, path, remedy)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise DocumentError(f"{store.redacted_url(path)}: must be a JSON list of texts. {remedy}")
    return tuple(value)


def read_local_json_object(path: Path, remedy: str = RESTORE) -> dict[str, Any]:
    """Return the JSON object in a file of a local folder, such as that of a model.

    Raises:
        FileNotFoundError: there is no such file.
        DocumentError: it cannot be read, is not a regular file, too large, or not one object.
    """
    name = printable_line(redact(str(path)))
    try:
        content = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DocumentError(
            f"{name}: cannot be read ({error.strerror or error}). {remedy}"
        ) from error
    return parse_json_object(content, name, remedy)
