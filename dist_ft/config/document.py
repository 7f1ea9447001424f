"""Reads YAML text and `section.field=value` overrides into one nested mapping.

Guarantees: only data is constructed, within bounds of size, depth and aliases (`yaml_documents`), a
duplicate key is reported instead of silently replacing the first, `1e-5` is a number, and every
mistake is a line in `problems` rather than an exception. Does not depend on the schema.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from dist_ft.core import yaml_documents
from dist_ft.core.errors import ConfigError, StorageError
from dist_ft.core.logs import redact
from dist_ft.storage.error_messages import UnusableFileError
from dist_ft.storage.filesystem import is_local, local_path
from dist_ft.storage.local_files import read_regular
from dist_ft.storage.single_files import read_file

_FORM = "A config has `section:` lines with indented `field: value` lines below."


class ParsedYaml(NamedTuple):
    """A YAML value, and a line for each duplicate key in it."""

    value: Any
    problems: list[str]


class Document(NamedTuple):
    """A nested mapping as a user wrote it, and a line for each problem."""

    mapping: dict[str, Any]
    problems: list[str]


def parse_yaml(text: str) -> ParsedYaml:
    """Return the one value in `text`, None without any; raises `yaml.YAMLError`."""
    values, problems = yaml_documents.parse_yaml(text)
    if len(values) > 1:
        raise yaml_documents.YamlProblem("more than one document (a line of ---)", None)
    return ParsedYaml(values[0] if values else None, problems)


def read_document(source: str) -> Document:
    """Return the mapping in the YAML file (or URL) `source`.

    A `source` that starts with a brace is the document itself: a Ray job receives its config so.

    Raises:
        ConfigError: the source cannot be read, or is not a mapping.
    """
    name = name_of(source)
    text = source if is_document(source) else _read_text(source)

    try:
        value, problems = parse_yaml(text)
    except yaml.YAMLError as error:
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
            return read_file(source, yaml_documents.CONFIG.num_bytes).decode()

        return read_regular(local_path(source), yaml_documents.CONFIG.num_bytes).decode()
    except FileNotFoundError as error:
        raise ConfigError(
            [f"no such file (looked in {os.getcwd()}). Check the path."], name
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(["is a folder. Give the YAML file in it."], name) from error
    except UnicodeDecodeError as error:
        raise ConfigError(["not a text file (UTF-8). Give a YAML file."], name) from error
    except UnusableFileError as error:
        raise ConfigError([f"{error}. Give a YAML file."], name) from error
    except OSError as error:
        raise ConfigError(
            [f"cannot be read ({error.strerror}). Check its permissions."], name
        ) from error
    except ValueError as error:  # a path with a NUL
        raise ConfigError([f"cannot be read ({error}). Check the path."], name) from error
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
        names = path.split(".")
        if not equals or not all(names) or len(names) > yaml_documents.MAX_DEPTH:
            problems.append(
                f"override {redact(override)!r}: not of the form section.field=value. Write, for "
                "example, schedule.steps=100."
            )
            continue

        try:
            value = _override_value(text, is_text(path))
        except (yaml.YAMLError, ValueError) as error:
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
    return yaml_documents.where(error)


def reason(error: Exception) -> str:
    """Return the relevant part of a YAML error's text."""
    return redact(yaml_documents.reason(error))
