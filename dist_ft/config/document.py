"""Reads YAML text and `section.field=value` overrides into one nested mapping.

Guarantees: only data is constructed (safe loader), a duplicate key is reported instead of silently
replacing the first, `1e-5` is a number, and every mistake is a line in `problems` rather than an
exception. Does not depend on the schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from dist_ft.core.errors import ConfigError, StorageError
from dist_ft.core.logs import redact
from dist_ft.storage.filesystem import is_local, local_path
from dist_ft.storage.single_files import read_file

# YAML 1.1, which PyYAML reads, takes 1e-5 for a text: its floats need a dot and a signed exponent.
_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")

_FORM = "A config has `section:` lines with indented `field: value` lines below."


class _Loader(yaml.SafeLoader):
    """The safe loader; also records duplicate keys and reads `1e-5` as a number."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping and record duplicate keys."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1  # marks count from 0
            if name in lines:
                self.problems.append(
                    f"line {line}: duplicate key {name!r} (first in line {lines[name]}). Each key "
                    "is allowed once. Remove one."
                )
            elif name != "<<":  # merges an anchor; allowed once for each anchor
                lines[name] = line

        return super().construct_mapping(node, deep)


# The characters are those that such a number can start with: PyYAML looks resolvers up by them.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


class ParsedYaml(NamedTuple):
    """A YAML value, and a line for each duplicate key in it."""

    value: Any
    problems: list[str]


class Document(NamedTuple):
    """A nested mapping as a user wrote it, and a line for each problem."""

    mapping: dict[str, Any]
    problems: list[str]


def parse_yaml(text: str) -> ParsedYaml:
    """Return the value in `text`; raises `yaml.YAMLError`."""
    loader = _Loader(text)
    try:
        return ParsedYaml(loader.get_single_data(), loader.problems)
    finally:
        loader.dispose()


def read_document(source: str) -> Document:
    """Return the mapping in the YAML file (or URL) `source`.

    A `source` that starts with a brace is the document itself: a Ray job receives its config so.

    Raises:
        ConfigError: the source cannot be read, or is not a mapping.
    """
    name = name_of(source)
    text = source if is_document(source) else _read_text(source)

    # A file of thousands of nested brackets exhausts the parser's stack.
    try:
        value, problems = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            [f"{where(error)}not valid YAML: {reason(error)}. {_FORM} Correct it."],
            name,
        ) from error

    # An empty file: each required field gets its own line later.
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            [f"is {_kind(value)}, not a mapping. {_FORM} See configs/ for complete ones."],
            name,
        )

    return Document(dict(value), problems)


def is_document(source: str) -> bool:
    """Whether `source` is a document itself rather than its path. Pure."""
    return source.startswith("{")


def name_of(source: str) -> str:
    """Return the name of `source` for messages. Pure."""
    return "config" if is_document(source) else redact(source)


def _read_text(source: str) -> str:
    name = redact(source)
    try:
        if not is_local(source):
            return read_file(source).decode()

        with open(local_path(source), encoding="utf-8") as handle:
            return handle.read()
    except FileNotFoundError as error:
        raise ConfigError(
            [f"no such file (looked in {os.getcwd()}). Check the path."], name
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(["is a folder. Give the YAML file in it."], name) from error
    except UnicodeDecodeError as error:
        raise ConfigError(["not a text file (UTF-8). Give a YAML file."], name) from error
    except OSError as error:
        raise ConfigError(
            [f"cannot be read ({error.strerror}). Check its permissions."], name
        ) from error
    except StorageError as error:
        raise ConfigError([str(error)], name) from error


def apply_overrides(
    mapping: Mapping[str, Any], overrides: Sequence[str], is_text: Callable[[str], bool]
) -> Document:
    """Return a copy of `mapping` with `path=value` overrides set.

    Values are YAML; those of text fields (`is_text(path)`) are taken literally unless quoted.
    """
    # A copy: `Search` applies the overrides of each trial to the same mapping.
    result = _copy(mapping)
    problems = []

    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            problems.append(
                f"override {redact(override)!r}: not of the form section.field=value. Write, for "
                "example, schedule.steps=100."
            )
            continue

        try:
            value = _override_value(text, is_text(path))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(
                f"override {redact(override)!r}: the value is not valid YAML ({reason(error)}). "
                f"Correct it, or quote a text: '{path}=\"...\"'"
            )
            continue

        problem = _set(result, path, value)
        if problem:
            problems.append(problem)

    return Document(result, problems)


def _override_value(text: str, is_text: bool) -> Any:
    # A prompt template such as "Q: {prompt} =" is no YAML, and need not be.
    try:
        value, duplicates = parse_yaml(text)
    except yaml.YAMLError:
        if is_text:
            return text
        raise
    if duplicates:
        raise ValueError(duplicates[0])

    # run.name=2024 is a text, though YAML reads a number; null still means the default.
    if is_text and value is not None and not isinstance(value, str):
        return text
    return value


def _set(mapping: dict[str, Any], path: str, value: Any) -> str | None:
    """Set `path` in nested `mapping`; return the problem if a value is in the way."""
    *parents, last = path.split(".")
    section = mapping
    for depth, key in enumerate(parents):
        # An override may add a section that the file lacks, or has empty.
        if section.get(key) is None:
            section[key] = {}

        if not isinstance(section[key], dict):
            parent = ".".join(parents[: depth + 1])
            return (
                f"override {path!r}: {parent} is {_kind(section[key])}, which has no fields. "
                f"Override {parent} as a whole."
            )
        section = section[key]

    section[last] = value
    return None


def with_field(mapping: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a nested mapping with the field at `path` set; values in the way are replaced."""
    if len(path) == 1:
        return {**mapping, path[0]: value}

    section = mapping.get(path[0])
    if not isinstance(section, Mapping):
        section = {}
    return {**mapping, path[0]: with_field(section, path[1:], value)}


def _copy(value: Any) -> Any:
    """Copy nested mappings, with keys as text; other values are shared."""
    if not isinstance(value, Mapping):
        return value
    return {str(key): _copy(item) for key, item in value.items()}


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list | tuple) else "a single value"


def where(error: Exception) -> str:
    """Return 'line N: ' of a YAML error, or nothing."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark else ""


def reason(error: Exception) -> str:
    """Return the relevant part of a YAML error's text."""
    if isinstance(error, RecursionError):
        return "nested too deeply"

    # `problem` is the reason alone; the text of a YAML error quotes lines of the file, which may
    # hold a credential.
    words = getattr(error, "problem", None) or str(error).splitlines()[0]
    return redact(str(words))
