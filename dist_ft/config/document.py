"""Reads YAML text and `section.field=value` overrides into one nested mapping.

Guarantees: only data is constructed, within bounds of size, depth and aliases (`yaml_documents`), a
duplicate key is reported instead of silently replacing the first, `1e-5` is a number, and every
mistake is a line in `problems` rather than an exception. Does not depend on the schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from dist_ft.core import yaml_documents
from dist_ft.core.errors import ConfigError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.secret_names import is_plain_name
from dist_ft.storage.error_messages import UnusableFileError
from dist_ft.storage.filesystem import is_local, local_path
from dist_ft.storage.local_files import read_regular
from dist_ft.storage.single_files import read_file

# What a message quotes of an override that has no "=": fields, in front of what is no name.
_FIELD_START = re.compile(r"[a-z_]+(?:\.{1,2}[a-z][a-z0-9_]{0,30}){1,3}(?=[\s:]|$)")
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")

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
        ) from None  # the parser's own text quotes lines of the file

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
    if is_document(source):
        return "config"

    # An override in the place of the file: `dist-ft train storage.options.s3.secret=...`.
    name, equals, _ = source.partition("=")
    if equals and not source.endswith((".yaml", ".yml")):
        return f"{name if is_plain_name(name) else ''}=..."
    return redact(source)


def _read_text(source: str) -> str:
    name = name_of(source)
    try:
        if not is_local(source):
            return read_file(source, yaml_documents.CONFIG.num_bytes).decode()

        return read_regular(local_path(source), yaml_documents.CONFIG.num_bytes).decode()
    except FileNotFoundError:
        raise ConfigError(
            [f"no such file (looked in {os.getcwd()}). Check the path."], name
        ) from None  # its text has the name, which may be an override
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

    for number, override in enumerate(overrides, 1):
        path, equals, text = override.partition("=")
        path = path.strip()
        names = path.split(".")
        shown = _shown(path, number)
        if not equals or not all(names) or len(names) > yaml_documents.MAX_DEPTH:
            # What was meant as the value may be a part of the path.
            shown = _shown_start(path, number)
            problems.append(
                f"override {shown}: not of the form section.field=value. Write, for example, "
                "schedule.steps=100."
            )
            continue

        try:
            value = _override_value(text, is_text(path))
        except (yaml.YAMLError, ValueError) as error:
            problems.append(
                f"override {shown}: the value is not valid YAML ({reason(error)}). Correct it, or "
                "quote a text: '...=\"...\"'"
            )
            continue

        blocking = _set(result, path, value)
        if blocking is not None:
            parent = blocking.path if shown == repr(path) else "a field above it"
            problems.append(
                f"override {shown}: {parent} is {blocking.kind}, which has no fields. Override "
                f"{parent} as a whole."
            )

    return Document(result, problems)


def _shown(path: str, number: int) -> str:
    """Return what a message quotes of the override `number` to `path`: field names, or nothing."""
    if is_plain_name(path) and redact(path) == path:
        return repr(path)
    return f"number {number}"


def _shown_start(text: str, number: int) -> str:
    """Return what a message quotes of an override without `=`: the field's name before it ends."""
    # storage.options.s3.secret VALUE, storage.options.s3.secret: VALUE; a long path may hold it.
    field = _FIELD_START.match(text)
    return repr(field[0]) if field else f"number {number}"


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


class _Blocking(NamedTuple):
    """A value that is no mapping at a `path` where an override needs one; its `kind` in words."""

    path: str
    kind: str


def _set(mapping: dict[str, Any], path: str, value: Any) -> _Blocking | None:
    """Set `path` in nested `mapping`; return what is in the way, if anything is."""
    *parents, last = path.split(".")
    section = mapping
    for depth, key in enumerate(parents):
        # An override may add a section that the file lacks, or has empty.
        if section.get(key) is None:
            section[key] = {}

        if not isinstance(section[key], dict):
            return _Blocking(".".join(parents[: depth + 1]), _kind(section[key]))
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
    return without_values(redact(yaml_documents.reason(error)))


def without_values(text: str) -> str:
    """Return a reason of the parser without what it quotes of the file: `*...`, `!...`, numbers."""
    # A password that starts with one of these signs is read as an alias, a tag or an anchor.
    return _QUOTED.sub(_without_value, text)


def _without_value(match: re.Match[str]) -> str:
    # Signs (","), kinds of tokens ("<stream end>") and Python's own tags are no values.
    quoted = match[0][1:-1]
    is_known = quoted.startswith(("<", "tag:yaml.org,2002:python/"))
    return match[0] if len(quoted) < 2 or is_known else "'...'"
