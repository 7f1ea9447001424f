"""Reads manifests: files, folders, and folders for kustomize (which need kubectl or kustomize).

Needs no cluster.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dist_ft.config.document import without_values
from dist_ft.core.errors import ConfigError

KUSTOMIZATION = ("kustomization.yaml", "kustomization.yml", "Kustomization")
KUSTOMIZE_TIMEOUT_S = 60


class Problem(NamedTuple):
    """What is wrong with an object.

    Attributes:
        path: path of the field, such as spec.containers[0].image.
        message: what is wrong, what is allowed, and what to do.
    """

    path: str
    message: str


@dataclass(frozen=True)
class Document:
    """One object.

    Attributes:
        file: the file, or kustomize folder, that it came from.
        content: the object.
    """

    file: str
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        """Its kind; empty if it has none."""
        return str(self.content.get("kind") or "")

    @property
    def name(self) -> str:
        """Its name; empty if it has none."""
        return str(lookup(self.content, "metadata", "name") or "")

    @property
    def namespace(self) -> str:
        """Its namespace; empty if it has none."""
        return str(lookup(self.content, "metadata", "namespace") or "")

    def describe(self, problem: Problem) -> str:
        """Return a problem of this object as one line."""
        object_name = f"{self.kind or 'object'}/{self.name or '?'}"
        return f"{self.file}: {object_name} {problem.path}: {problem.message}"


class _Loader(yaml.SafeLoader):
    """Refuses a duplicate key, of which YAML would silently use the last."""


def _load_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    # resolves merge keys (<<), so that an inherited key and an own one are not taken for duplicates
    mapping: dict[Any, Any] = {}
    loader.flatten_mapping(node)

    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
        if key in mapping:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key {key!r}", key_node.start_mark
            )
        mapping[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _load_mapping)


def lookup(content: Any, *steps: str | int, default: Any = None) -> Any:
    """Return the value at a path of keys and indices; `default` if it is missing or null."""
    for step in steps:
        try:
            content = content[step]
        except (KeyError, IndexError, TypeError):
            return default
    return default if content is None else content


def read_documents(paths: Sequence[str]) -> list[Document]:
    """Return all objects in files and folders.

    Raises:
        ConfigError: lists everything that cannot be read.
    """
    # A mistake in one file does not hide those in others.
    documents: list[Document] = []
    problems: list[str] = []

    for path in paths:
        try:
            documents += _read(Path(path))
        except ConfigError as error:
            problems += error.problems

    if not problems and not documents:
        problems = [
            f"{' '.join(paths)}: contains no manifest. Manifests are YAML files, such as "
            "`dist-ft k8s render` writes. Check the path."
        ]
    if problems:
        raise ConfigError(problems, "k8s check")
    return documents


def _read(path: Path) -> Iterator[Document]:
    if path.is_file():
        return parse_documents(str(path), _read_text(path))
    if not path.is_dir():
        raise ConfigError([f"{path}: no such file or folder. Check the path."])

    for name in KUSTOMIZATION:
        if (path / name).is_file():
            return _read_kustomize_folder(path, path / name)

    # Not recursive, as `kubectl apply -f`. Sorted, so that the report does not depend on the disk.
    files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
    return _read_files(files)


def _read_files(files: Sequence[Path]) -> Iterator[Document]:
    for file in files:
        yield from parse_documents(str(file), _read_text(file))


def parse_documents(name: str, text: str) -> Iterator[Document]:
    """Yield the objects of a YAML stream; those of a List one by one.

    Raises:
        ConfigError: names the line that is not YAML.
    """
    # YAML is parsed lazily; all of it is parsed here, where a syntax error names its line
    try:
        contents = list(yaml.load_all(text, Loader=_Loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        # What the parser quotes may be a part of a Secret; a duplicate key is a name.
        reason = str(getattr(error, "problem", None) or type(error).__name__)
        if not reason.startswith("duplicate key"):
            reason = without_values(reason)
        raise ConfigError([f"{name}{line}: is not valid YAML ({reason}). Correct it."]) from None

    for content in contents:
        # an empty document, such as the one after a last "---"
        if content is None:
            continue

        is_list = isinstance(content, dict) and content.get("kind") == "List"
        for item in content["items"] if is_list else [content]:
            if not isinstance(item, dict):
                raise ConfigError(
                    [
                        f"{name}: a document is a {type(item).__name__}. A manifest must be a "
                        "mapping. Correct it."
                    ]
                )

            yield Document(name, item)


def _read_kustomize_folder(folder: Path, file: Path) -> Iterator[Document]:
    """Yield what kustomize builds from a folder; one that only lists files is read without it."""
    content = next(iter(parse_documents(str(file), _read_text(file)))).content
    if content.get("kind") == "Component":
        raise ConfigError(
            [
                f"{folder}: a kustomize component contains no manifests by itself. Check an "
                "overlay that uses it."
            ]
        )

    # A folder from `dist-ft k8s render` has a kustomization that changes nothing: it can be checked
    # where kustomize is not installed. Resources may also be folders or URLs.
    resources = content.get("resources") or []
    only_lists = content.keys() <= {"apiVersion", "kind", "resources"}
    if only_lists and all((folder / name).is_file() for name in resources):
        return _read_files([folder / name for name in resources])
    return parse_documents(str(folder), _run_kustomize(folder))


def _run_kustomize(folder: Path) -> str:
    """Return what kubectl or kustomize builds from a folder."""
    command: list[str] | None = None
    for candidate in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(candidate[0]):
            command = candidate
            break
    if command is None:
        raise ConfigError(
            [
                f"{folder}: a kustomize folder, but neither kubectl nor kustomize is installed. "
                "Install one, or check the output of `dist-ft k8s render --overlay`, which needs "
                "neither."
            ]
        )

    try:
        done = subprocess.run(
            [*command, str(folder)],
            capture_output=True,
            text=True,
            timeout=KUSTOMIZE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            [
                f"{folder}: {command[0]} did not finish within {KUSTOMIZE_TIMEOUT_S} s. Check "
                "whether it loads from the network."
            ]
        ) from error

    if done.returncode:
        # warnings come first, the error last
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError([f"{folder}: {command[0]} cannot build it ({reason}). Correct it."])
    return done.stdout


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [f"{path}: cannot be read ({type(error).__name__}). Check the file."]
        ) from error
