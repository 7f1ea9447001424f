"""Reads the JSON files that a run stores for its later starts.

They are written whole, but a disk, a copy or a person may have damaged one since.
"""

from __future__ import annotations

from typing import TypeVar

from dist_ft.core.errors import CheckpointError
from dist_ft.core.json_documents import decode_json
from dist_ft.storage.documents import MAX_BYTES
from dist_ft.storage.filesystem import Store

T = TypeVar("T")
_NAMES: dict[type, str] = {list: "list", dict: "object"}


def read_stored_json(store: Store, path: str, kind: type[T], remedy: str) -> T:
    """Return the content of a JSON file that holds a list or an object.

    Args:
        store: folder of the run.
        path: the file in it.
        kind: `list` or `dict`.
        remedy: what to do if the file is damaged: a sentence.

    Raises:
        CheckpointError: it is torn, empty, or holds something else.
        StorageError: it is missing, or the storage does not respond.
    """
    problem = f"a JSON {_NAMES[kind]} is expected"
    try:
        content = decode_json(store.read_at_most(path, MAX_BYTES))
        if isinstance(content, kind):
            return content
    except ValueError as error:
        problem = str(error)

    raise CheckpointError(f"{store.redacted_url(path)}: the file is damaged ({problem}). {remedy}")
