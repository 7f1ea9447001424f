"""Reading what a user wrote: YAML text and `section.field=value` overrides, into one nested mapping.

Guarantees: only data is constructed (safe loader), a key that stands twice is reported instead of winning in silence,
`1e-5` is a number, and every mistake is a line in `problems` rather than an exception. Knows nothing of the schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from dist_ft.core.errors import ConfigError, StorageError
from dist_ft.core.logs import redact
from dist_ft.storage.filesystem import Store, is_local, local_path

_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """The safe loader, which also notes keys that stand twice and reads `1e-5` as a number."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, noting keys that stand twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                self.problems.append(
                    f"line {line}: the key {name!r} stands twice (first in line {lines[name]}); "
                    f"a key may stand once; remove one of them"
                )
            elif name != "<<":
                lines[name] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Return the value `text` holds and the keys that stand twice; raises `yaml.YAMLError`."""
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.problems
    finally:
        loader.dispose()


def read_document(source: str) -> tuple[dict[str, Any], list[str]]:
    """Return the mapping in the YAML file (or URL) `source`, and its problems; one that can't be used is an error.

    A `source` that begins with a brace is the document itself: so a job of Ray takes its config along.
    """
    name = name_of(source)
    text = source if is_document(source) else _read_text(source)
    try:
        value, problems = parse_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            [
                f"{where(error)}not valid YAML: {reason(error)}; a config is `section:` lines with indented "
                f"`field: value` lines below; correct it"
            ],
            name,
        ) from error
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        raise ConfigError(
            [
                f"holds {_kind(value)}, not a mapping; a config is `section:` lines with indented "
                f"`field: value` lines below; see configs/ for complete ones"
            ],
            name,
        )
    return dict(value), problems


def is_document(source: str) -> bool:
    """Tell whether `source` is a document rather than where one is. Pure."""
    return source.startswith("{")


def name_of(source: str) -> str:
    """Return what to call `source` in a message. Pure."""
    return "config" if is_document(source) else redact(source)


def _read_text(source: str) -> str:
    name = redact(source)
    try:
        if not is_local(source):
            folder, _, file = source.rpartition("/")
            return Store(folder).read(file).decode()
        with open(local_path(source), encoding="utf-8") as handle:
            return handle.read()
    except FileNotFoundError as error:
        raise ConfigError(
            [f"no such file (looked in {os.getcwd()}); check the path"], name
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(["this is a folder; give the YAML file in it"], name) from error
    except UnicodeDecodeError as error:
        raise ConfigError(["not a text file (UTF-8); give a YAML file"], name) from error
    except OSError as error:
        raise ConfigError(
            [f"can not be read ({error.strerror}); check its permissions"], name
        ) from error
    except StorageError as error:
        raise ConfigError([str(error)], name) from error


def apply_overrides(
    mapping: Mapping[str, Any], overrides: Sequence[str], is_text: Callable[[str], bool]
) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of `mapping` with `path=value` overrides set, and the problems of those that can't be.

    Values are YAML; those of fields that hold a text (`is_text(path)`) are taken as written unless they are quoted.
    """
    result = _copy(mapping)
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            problems.append(
                f"override {redact(override)!r}: not of the form section.field=value; "
                f"write for instance schedule.steps=100"
            )
            continue
        try:
            value = _override_value(text, is_text(path))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(
                f"override {redact(override)!r}: the value is not valid YAML ({reason(error)}); "
                f"correct it, or quote a text: '{path}=\"...\"'"
            )
            continue
        problem = _set(result, path, value)
        problems.extend([problem] if problem else [])
    return result, problems


def _override_value(text: str, is_text: bool) -> Any:
    try:
        value, twice = parse_yaml(text)
    except yaml.YAMLError:
        if is_text:
            return text
        raise
    if twice:
        raise ValueError(twice[0])
    return text if is_text and value is not None and not isinstance(value, str) else value


def _set(mapping: dict[str, Any], path: str, value: Any) -> str | None:
    """Set `path` in nested `mapping`; return what is in the way, if anything."""
    *parents, last = path.split(".")
    here = mapping
    for depth, key in enumerate(parents):
        if here.get(key) is None:
            here[key] = {}
        if not isinstance(here[key], dict):
            above = ".".join(parents[: depth + 1])
            return (
                f"override {path!r}: {above} holds {_kind(here[key])}, which has no parts; "
                f"override {above} as a whole"
            )
        here = here[key]
    here[last] = value
    return None


def with_field(mapping: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a nested mapping with the field at `path` set; what is in the way is replaced."""
    if len(path) == 1:
        return {**mapping, path[0]: value}
    held = mapping.get(path[0])
    return {
        **mapping,
        path[0]: with_field(held if isinstance(held, Mapping) else {}, path[1:], value),
    }


def _copy(value: Any) -> Any:
    """Copy nested mappings (keys as text); leave other values alone."""
    return (
        {str(key): _copy(item) for key, item in value.items()}
        if isinstance(value, Mapping)
        else value
    )


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list | tuple) else "a single value"


def where(error: Exception) -> str:
    """Return 'line N: ' of a YAML error, or nothing."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: " if mark else ""


def reason(error: Exception) -> str:
    """Return the few words of a YAML error that help."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    words = getattr(error, "problem", None) or str(error).splitlines()[0]
    return redact(str(words))
