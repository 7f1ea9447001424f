"""Loads a run's config: one YAML file (or a mapping) and `section.field=value` overrides.

Guarantees: all problems are reported at once, in one `ConfigError` whose lines name the field, what
is allowed and what to do. What is written back (`to_mapping`, `resolved_yaml`) loads to an equal
config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from dist_ft.config import renames
from dist_ft.config.assemble import assemble, assemble_stored, assemble_stored_section
from dist_ft.config.credentials import mask_credentials, require_no_credentials
from dist_ft.config.document import apply_overrides, name_of, parse_yaml, read_document
from dist_ft.config.error_messages import is_text
from dist_ft.config.identity import Change, changes, check_resume, identity
from dist_ft.config.schema import RunConfig, Section
from dist_ft.config.task_facts import IMPORT_PATH, allow_task, task_class
from dist_ft.core.errors import ConfigError
from dist_ft.core.logs import redact
from dist_ft.storage.filesystem import Store

S = TypeVar("S", bound=Section)

STORED = "run.yaml"
"""File in a run's folder with its resolved config."""

__all__ = [
    "STORED",
    "Change",
    "changes",
    "check_resume",
    "identity",
    "inspect_config",
    "load_config",
    "load_stored_config",
    "load_stored_mapping",
    "load_stored_section",
    "read_stored_config",
    "resolved_yaml",
    "to_mapping",
]


def load_config(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> RunConfig:
    """Return the config in a YAML file (path or fsspec URL) or a mapping, with `overrides`.

    Raises:
        ConfigError: lists all problems: unknown keys (and what was probably meant), wrong values,
            missing fields, contradictions between fields.
    """
    config, problems, source = inspect_config(path_or_mapping, overrides)
    if problems:
        raise ConfigError(problems, source)
    return config


class InspectedConfig(NamedTuple):
    """A config that may have problems.

    Attributes:
        config: without its broken fields: reading one raises AttributeError.
        problems: one line each.
        source: name of the file, for messages.
    """

    config: RunConfig
    problems: list[str]
    source: str


def inspect_config(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> InspectedConfig:
    """As `load_config`, but return the problems instead of raising them.

    Raises:
        ConfigError: the file cannot be read at all.
    """
    # A mapping cannot have a duplicate key any more; only a file can.
    duplicates: list[str] = []
    if isinstance(path_or_mapping, Mapping):
        source, document = "config", dict(path_or_mapping)
    else:
        source = os.fspath(path_or_mapping)
        document, duplicates = read_document(source)
    mapping, invalid_overrides = apply_overrides(document, overrides, is_text)

    # First of all: no check sees a credential, so no message can quote one.
    masked = mask_credentials(mapping)

    # Before the checks, which read the facts of the task. After the overrides, which may name it.
    _import_task(masked.mapping)
    assembled = assemble(masked.mapping)
    for secret_path in masked.paths:
        _remove_field(assembled.section, secret_path)

    problems = [*duplicates, *invalid_overrides, *assembled.problems, *masked.problems]
    return InspectedConfig(
        assembled.section,
        [redact(problem) for problem in problems],
        name_of(source),
    )


def _remove_field(section: Section, path: Sequence[Any]) -> None:
    """Remove the field at `path`, as if it were broken: what stands there is no value."""
    for name in path:
        if not isinstance(name, str):
            return
        value = vars(section).get(name)
        if isinstance(value, Section):
            section = value
        else:
            # Options of libraries are complete without their credentials.
            if not isinstance(value, dict):
                vars(section).pop(name, None)
            return


def _import_task(mapping: Mapping[str, Any]) -> None:
    """Import the task that the user's config names, if it is a class of their own."""
    # The mapping is not checked yet: anything may stand in the place of the section.
    section = mapping.get("task")
    name = section.get("name") if isinstance(section, Mapping) else None

    # Only here, where the config is the user's own, does a name allow code to run. Configs that
    # a run or a model stored take other ways, which allow nothing.
    if isinstance(name, str) and IMPORT_PATH.fullmatch(name):
        allow_task(name)
        task_class(name)


def read_stored_config(store: Store) -> dict[str, Any]:
    """Return a run's stored config as a mapping with the names of this version; {} without one."""
    if not store.exists(STORED):
        return {}

    stored, _ = parse_yaml(store.read(STORED).decode())
    if not isinstance(stored, Mapping):
        return {}
    return renames.RUN.migrate(stored)


def load_stored_config(store: Store) -> RunConfig:
    """Return the stored config of the run at `store`.

    Raises:
        ConfigError: a field is broken, missing, or unknown to this version.
    """
    return load_stored_mapping(read_stored_config(store), store.redacted_url(STORED))


def load_stored_mapping(mapping: Mapping[str, Any], source: str) -> RunConfig:
    """Return the config in a mapping that was stored in `source`; see `load_stored_config`."""
    assembled = assemble_stored(mapping)
    if assembled.problems:
        raise ConfigError(assembled.problems, source)
    return assembled.section


def load_stored_section(document: Mapping[str, Any], name: str, model: type[S], source: str) -> S:
    """Return the section `name` of a document stored in `source`; defaults if it is absent.

    Raises:
        ConfigError: a field is broken, or unknown to this version.
    """
    assembled = assemble_stored_section(model, document.get(name) or {}, name)
    if assembled.problems:
        raise ConfigError(assembled.problems, source)
    return assembled.section


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Return `config` as nested plain values, defaults included; `load_config` reads it."""
    return config.model_dump(mode="json")


def resolved_yaml(config: RunConfig) -> str:
    """Return `config` as YAML, defaults included, in the order of the schema.

    Raises:
        ConfigError: it holds a credential; a config that Python code made was not checked before.
    """
    import yaml

    require_no_credentials(config)

    # Unsorted, as people read it: run, model and data come first, as in their own file.
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=110)
