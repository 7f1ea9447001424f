"""The small files of a run without which its checkpoints cannot be used.

These are its config, its model's config and tokenizer, the labels and the index of its data. A
running attempt has a copy of them, and writes back what is removed or damaged under it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from dist_ft.config.load import STORED
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.core.json_documents import decode_json
from dist_ft.storage.documents import MAX_BYTES
from dist_ft.storage.filesystem import Store
from dist_ft.storage.stored_json import read_stored_json

log = logging.getLogger("dist_ft.checkpoint")
MODEL_FOLDER = "model"
"""Folder of a run with the model's config, tokenizer and chat template."""
DATA_FOLDER = "data"
"""Folder of a run with the index of its data, and with labels and examples found in it."""
LABELS_FILE = f"{DATA_FOLDER}/labels.json"
"""File of a run: the labels found in its training data."""
TEMPLATES_FILE = f"{DATA_FOLDER}/examples.json"
"""File of a run: its prompt templates with the examples written in."""
MAX_FILE_BYTES = 64 * 2**20
"""Larger files are not copied: the next start builds the index again."""


_MARKER = f"{MODEL_FOLDER}/.complete"
"""File with the length of each file in the model's folder, written last."""


def store_model_files(store: Store, files: Mapping[str, bytes]) -> None:
    """Write {name: content} into the model's folder of the run at `store`."""
    for name, content in sorted(files.items()):
        store.write(f"{MODEL_FOLDER}/{name}", content)

    # The marker last: after a crash in between, the next start writes all files again.
    lengths = {name: len(content) for name, content in files.items()}
    store.write(_MARKER, json.dumps({"files": lengths}).encode())


def model_is_stored(store: Store) -> bool:
    """Return whether the model's config and tokenizer are stored completely."""
    return store.exists(_MARKER) and not find_lost_model_file(store)


def find_lost_model_file(store: Store) -> str:
    """Return what is wrong with the first file of the model's folder that was lost; "" if none."""
    sizes = store.child(MODEL_FOLDER).sizes()
    expected: dict[str, int | None] = {"config.json": None}
    expected.update(_stored_lengths(store))
    for name, num_bytes in expected.items():
        where = store.redacted_url(f"{MODEL_FOLDER}/{name}")
        if name not in sizes:
            return f"{where}: the file is missing"

        # Version 0.1.0 stored no lengths; an empty file is damaged in any case.
        if sizes[name] == 0 or num_bytes not in (None, sizes[name]):
            return f"{where}: has {sizes[name]} bytes, but other content was stored"
    return ""


def require_stored_files(store: Store) -> None:
    """Raise CheckpointError if a file is lost without which no checkpoint of a run can be used."""
    problem = find_lost_model_file(store)
    if not store.exists(STORED):
        problem = f"{store.redacted_url(STORED)}: the file is missing"
    elif not store.read(STORED).strip():
        problem = f"{store.redacted_url(STORED)}: the file is empty"

    if problem:
        raise CheckpointError(
            f"{problem}. Every run stores its config, and its model's config and tokenizer. Run "
            "`dist-ft train` with the run's config again, which writes them anew, or restore the "
            "file from a copy."
        )


def read_labels(store: Store) -> tuple[str, ...]:
    """Return the labels that a run found in its training data, in the order of its head."""
    return _read_texts(store, LABELS_FILE)


def read_templates(store: Store) -> tuple[str, ...]:
    """Return the prompt templates of a run, with the examples written in."""
    return _read_texts(store, TEMPLATES_FILE)


def _read_texts(store: Store, path: str) -> tuple[str, ...]:
    remedy = (
        "Restore it from a copy, or remove it: with the same training data the next start of the "
        "run writes the same file."
    )
    texts = read_stored_json(store, path, list, remedy)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise CheckpointError(
            f"{store.redacted_url(path)}: the file is damaged (a list of texts is expected). "
            f"{remedy}"
        )
    return tuple(texts)


def _stored_lengths(store: Store) -> dict[str, int]:
    if not store.exists(_MARKER):
        return {}
    try:
        return dict(decode_json(store.read_at_most(_MARKER, MAX_BYTES)).get("files", {}))
    except (ValueError, TypeError, AttributeError):
        return {}  # the marker itself is damaged


class StoredFiles:
    """A copy of the small files of the run at `store` (rank 0 only)."""

    def __init__(self, store: Store) -> None:
        """Store the argument; nothing is read or written."""
        self._store = store
        self._contents: dict[str, bytes] = {}

    def remember(self) -> None:
        """Read the files; called once all of them are stored. Failing storage is logged."""
        contents: dict[str, bytes] = {}
        try:
            contents[STORED] = self._store.read(STORED)
            for path, num_bytes in self._sizes().items():
                if num_bytes <= MAX_FILE_BYTES:
                    contents[path] = self._store.read(path)
        except StorageError as error:
            log.warning("files of the run cannot be restored should they get lost: %s", error)

        # Set at once: a commit may be restoring in another thread.
        self._contents = contents

    def restore(self) -> None:
        """Write back files that are missing or altered. Failing storage is logged."""
        contents = self._contents
        if not contents:
            return

        try:
            sizes = self._sizes()
            lost = [
                path
                for path, content in contents.items()
                if path != STORED and sizes.get(path) != len(content)
            ]
            # By its content: it can be edited, and a config of the same length is no torn one.
            if self._read_config() != contents[STORED]:
                lost.append(STORED)

            for path in lost:
                self._store.write(path, contents[path])
                log.warning(
                    "%s was removed or altered while this run trains; written again",
                    self._store.redacted_url(path),
                )
        except StorageError as error:
            log.warning("files of the run were lost and cannot be restored: %s", error)

    def _sizes(self) -> dict[str, int]:
        """Return {path: bytes} of the files, except the config."""
        sizes = {}
        for folder in (MODEL_FOLDER, DATA_FOLDER):
            for path, num_bytes in self._store.sizes(folder).items():
                sizes[f"{folder}/{path}"] = num_bytes
        return sizes

    def _read_config(self) -> bytes | None:
        try:
            return self._store.read(STORED)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
