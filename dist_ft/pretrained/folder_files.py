"""Files of a folder that others provide: regular files inside the folder, JSON within limits.

A name in a file of the folder (a shard, a tokenizer file) is one in the folder. A symbolic link may
lead to a file of the folder, or to the blobs of the hub's cache, where the files of its snapshots
lie; any other link is refused.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from dist_ft.core.errors import MAX_LINE, ModelError

MAX_CONFIG_BYTES = 2**24
"""Largest file of settings: config.json with the names of 100,000 labels has 5 MB."""
MAX_INDEX_BYTES = 2**27
"""Largest list of weights: that of a model with a million tensors has 100 MB."""
MAX_DEPTH = 64
_CONTENTS = {
    "config.json": "config",
    "generation_config.json": "generation config",
    "tokenizer_config.json": "tokenizer",
    "adapter_config.json": "adapter",
    "dist_ft.json": "model",
}
"""What a file of settings describes; all others are indexes of weights."""
_SNAPSHOT = re.compile(r"/snapshots/[^/]+(?:/.*)?$")


def require_folder(folder: str | Path, shown: str) -> Path:
    """Return the path of a local folder.

    Args:
        folder: the folder.
        shown: what the user called it, for errors.

    Raises:
        ModelError: it is none. transformers would take its path for a name on the hub.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(
            f"{shown}: the folder does not exist. A folder with a model is needed. Check the path."
        )
    return path


def resolve_in_folder(folder: Path, name: Any, shown: str) -> Path:
    """Return the path of the file `name` in `folder`, which need not exist.

    Raises:
        ModelError: the name or a link leaves the folder, or it is not a regular file.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ModelError(
            f"{shown}: names the file {str(name)[:MAX_LINE]!r}. Names of files in the folder are "
            "allowed. Download the model again."
        )

    is_outside = os.path.isabs(name) or "\\" in name or ".." in name.split("/")
    path = folder / name
    try:
        mode = os.stat(path).st_mode
        is_outside = is_outside or not _is_inside(folder, path)
    except FileNotFoundError:
        # A broken link is reported as one that leaves the folder: it would, once its target exists.
        is_outside = is_outside or path.is_symlink()
        mode = stat.S_IFREG
    except OSError as error:
        raise ModelError(
            f"{shown}: cannot read {name} ({error.strerror}). Make it readable."
        ) from error

    if is_outside:
        raise ModelError(
            f"{shown}: {name} leads out of the folder. Files of the folder itself are allowed. "
            "Copy the file into it."
        )
    if not stat.S_ISREG(mode):
        raise ModelError(f"{shown}: {name} is not a regular file. Only those are read. Remove it.")
    return path


def _is_inside(folder: Path, path: Path) -> bool:
    """Whether the target of `path` lies in `folder`, or in the blobs of its hub repository."""
    target = os.path.realpath(path)
    real_folder = os.path.realpath(folder)
    allowed = [real_folder]

    # <cache>/models--org--name/snapshots/<commit>/file links to <cache>/models--org--name/blobs/.
    repository = _SNAPSHOT.sub("", real_folder)
    if repository != real_folder and os.path.basename(repository).startswith("models--"):
        allowed.append(os.path.join(repository, "blobs"))
    return any(target.startswith(base.rstrip("/") + "/") for base in allowed)


def read_bytes(folder: Path, name: str, shown: str, max_bytes: int = MAX_CONFIG_BYTES) -> bytes:
    """Return the content of a file in `folder`.

    Raises:
        ModelError: it cannot be read, or is larger than `max_bytes`.
    """
    path = resolve_in_folder(folder, name, shown)
    try:
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelError(
            f"{shown}: cannot read {name} ({error.strerror}). Make it readable, or download the "
            "model again."
        ) from error

    if len(content) > max_bytes:
        raise ModelError(
            f"{shown}: {name} has more than {max_bytes / 2**20:.0f} MiB. Files of settings are "
            "smaller. Download the model again."
        )
    return content


def read_json(
    folder: Path, name: str, shown: str, max_bytes: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
    """Return the JSON object in a file of `folder`.

    Raises:
        ModelError: it cannot be read, or is not a JSON object of at most `MAX_DEPTH` levels in
            UTF-8.
    """
    content = read_bytes(folder, name, shown, max_bytes)
    try:
        value = json.loads(content.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"holds a JSON {type(value).__name__}")
        _require_shallow(value)
    except (ValueError, RecursionError) as error:
        # The parser stops with a RecursionError before its stack is full.
        reason = str(error)[:MAX_LINE]
        raise ModelError(
            f"{shown}: cannot load the {_CONTENTS.get(name, 'weights')} ({name}: {reason}). A JSON "
            "object in UTF-8 is needed. Download the model again."
        ) from error
    return value


def _require_shallow(value: Any) -> None:
    """Raise ValueError if lists and objects are nested too deeply for code that recurses."""
    level = [value]
    for _ in range(MAX_DEPTH):
        parts: list[Any] = []
        for container in level:
            parts += container.values() if isinstance(container, dict) else container
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
