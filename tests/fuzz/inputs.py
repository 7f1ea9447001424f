"""An input of one case: a command line (or a call), and the files that it finds."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any


class Special(Enum):
    """What stands in the place of a file."""

    FIFO = "fifo"
    FOLDER = "folder"
    LINK_TO_ITSELF = "link"
    ABSENT = "absent"


File = bytes | Special


@dataclass(frozen=True)
class Input:
    """What one case gives to dist_ft.

    Attributes:
        words: the command line after `dist-ft`. Bytes that are not UTF-8 are surrogates, as in sys.argv.
        call: name of a function in `fuzz.calls` that runs in place of the command line; "": none.
        materials: names of the sound files (`fuzz.materials`) that are there first.
        files: path in the project's folder -> content that replaces the sound one.
    """

    words: tuple[str, ...] = ()
    call: str = ""
    materials: tuple[str, ...] = ()
    files: Mapping[str, File] = field(default_factory=dict)

    def write_files(self, project: Path) -> None:
        """Write the files into the folder `project`."""
        for name, content in self.files.items():
            path = project / name
            _remove(path)
            if content is Special.ABSENT:
                continue

            path.parent.mkdir(parents=True, exist_ok=True)
            if content is Special.FIFO:
                os.mkfifo(path)
            elif content is Special.FOLDER:
                path.mkdir()
            elif content is Special.LINK_TO_ITSELF:
                path.symlink_to(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)

    def to_json(self) -> dict[str, Any]:
        """Return the input as JSON values."""
        files: dict[str, dict[str, str]] = {}
        for name, content in self.files.items():
            files[name] = _encode(content)
        return {
            "words": list(self.words),
            "call": self.call,
            "materials": list(self.materials),
            "files": files,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Input:
        """Return the input that `to_json` returned as JSON values."""
        files = {name: _decode(content) for name, content in values["files"].items()}
        return cls(tuple(values["words"]), values["call"], tuple(values["materials"]), files)


@dataclass(frozen=True)
class Case:
    """An input with its name: what generated it, or the file that holds it."""

    kind: str
    name: str
    input: Input


def load_case(path: Path) -> Case:
    """Return the case in a file of `cases/`."""
    values = json.loads(path.read_text("utf-8"))
    return Case(values["kind"], path.stem, Input.from_json(values["input"]))


def save_case(path: Path, case: Case, why: str) -> None:
    """Write a case to a file; `why`: what it does wrong, or did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"kind": case.kind, "why": why, "input": case.input.to_json()}
    path.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _encode(content: File) -> dict[str, str]:
    if isinstance(content, Special):
        return {"special": content.value}
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _decode(values: Mapping[str, str]) -> File:
    if "special" in values:
        return Special(values["special"])
    if "text" in values:
        return values["text"].encode()
    return base64.b64decode(values["base64"])
