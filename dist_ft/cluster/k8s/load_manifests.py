"""Reads manifests: files, folders, and folders for kustomize (by kubectl or kustomize). Needs no cluster."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_ft.core.errors import ConfigError

KUSTOMIZATION = ("kustomization.yaml", "kustomization.yml", "Kustomization")
KUSTOMIZE_S = 60


@dataclass(frozen=True)
class Document:
    """One object and the file (or kustomize folder) it came from."""

    file: str
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        """Its kind; empty if it has none."""
        return str(self.content.get("kind") or "")

    @property
    def name(self) -> str:
        """Its name; empty if it has none."""
        return str(at(self.content, "metadata", "name") or "")

    @property
    def namespace(self) -> str:
        """Its namespace; empty if it names none."""
        return str(at(self.content, "metadata", "namespace") or "")

    def say(self, path: str, text: str) -> str:
        """Return a problem of this object as one line."""
        return f"{self.file}: {self.kind or 'object'}/{self.name or '?'} {path}: {text}"


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would keep the last in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in found:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands there twice", key_node.start_mark
            )
        found[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def at(content: Any, *steps: str | int, default: Any = None) -> Any:
    """Return what lies at a path of keys and indices; `default` where the path leads nowhere, or to null."""
    for step in steps:
        try:
            content = content[step]
        except (KeyError, IndexError, TypeError):
            return default
    return default if content is None else content


def read(paths: Sequence[str]) -> list[Document]:
    """Return all objects in files and folders; raises ConfigError with everything that can not be read."""
    found: list[Document] = []
    problems: list[str] = []
    for path in paths:
        try:
            found += _read(Path(path))
        except ConfigError as error:
            problems += error.problems
    if not problems and not found:
        problems = [
            f"{' '.join(paths)}: no manifest in it; give files that `dist-ft k8s render` wrote, or others"
        ]
    if problems:
        raise ConfigError(problems, "k8s check")
    return found


def _read(path: Path) -> Iterator[Document]:
    if path.is_file():
        return parse(str(path), _text(path))
    if not path.is_dir():
        raise ConfigError([f"{path}: no such file or folder; check the path"])
    listed = next((path / name for name in KUSTOMIZATION if (path / name).is_file()), None)
    if listed is not None:
        return _kustomized(path, listed)
    files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
    return (document for file in files for document in parse(str(file), _text(file)))


def parse(name: str, text: str) -> Iterator[Document]:
    """Yield the objects of a YAML stream; those of a List one by one. Raises ConfigError with the line it fails at."""
    try:
        contents = [
            content for content in yaml.load_all(text, Loader=_Loader) if content is not None
        ]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or error
        raise ConfigError([f"{name}{line}: not YAML ({why}); correct it"]) from error
    for content in contents:
        for one in (
            content["items"]
            if isinstance(content, dict) and content.get("kind") == "List"
            else [content]
        ):
            if not isinstance(one, dict):
                raise ConfigError(
                    [f"{name}: a document that is no object but {type(one).__name__}; correct it"]
                )
            yield Document(name, one)


def _kustomized(folder: Path, file: Path) -> Iterator[Document]:
    """Yield what kustomize makes of a folder; where it only lists files, these are read without it."""
    content = next(iter(parse(str(file), _text(file)))).content
    if content.get("kind") == "Component":
        raise ConfigError(
            [f"{folder}: a kustomize component is nothing by itself; give an overlay that takes it"]
        )
    resources = content.get("resources") or []
    if content.keys() <= {"apiVersion", "kind", "resources"} and all(
        (folder / name).is_file() for name in resources
    ):
        return (
            document
            for name in resources
            for document in parse(str(folder / name), _text(folder / name))
        )
    command = next(
        (
            [tool, *more]
            for tool, more in (("kubectl", ["kustomize"]), ("kustomize", ["build"]))
            if shutil.which(tool)
        ),
        None,
    )
    if command is None:
        raise ConfigError(
            [
                f"{folder}: a folder for kustomize, and neither kubectl nor kustomize is here; install "
                "one, or check what `dist-ft k8s render --overlay` writes, which needs neither"
            ]
        )
    try:
        done = subprocess.run(
            [*command, str(folder)],
            capture_output=True,
            text=True,
            timeout=KUSTOMIZE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            [
                f"{folder}: {command[0]} gave no answer in {KUSTOMIZE_S} s; does it load from the "
                "network?"
            ]
        ) from error
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError([f"{folder}: {command[0]} can not put it together ({why}); correct it"])
    return parse(str(folder), done.stdout)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [f"{path}: can not be read ({type(error).__name__}); check the file"]
        ) from error
