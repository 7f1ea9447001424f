"""Loads a run's config: one YAML file (or a mapping) and `section.field=value` overrides.

Guarantees: all problems are reported at once, in one `ConfigError` whose lines name the field, what
is allowed and what to do. What is written back (`to_mapping`, `resolved_yaml`) loads to an equal
config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import yaml

from dist_ft.config import renames
from dist_ft.config.assemble import assemble, assemble_stored, assemble_stored_section
from dist_ft.config.credentials import mask_credentials, require_no_credentials
from dist_ft.config.document import apply_overrides, name_of, read_document
from dist_ft.config.error_messages import is_text
from dist_ft.config.identity import Change, changes, check_resume, identity
from dist_ft.config.schema import RunConfig, Section, StorageSection
from dist_ft.config.task_facts import IMPORT_PATH, allow_task, task_class
from dist_ft.core import yaml_documents
from dist_ft.core.errors import ConfigError
from dist_ft.core.json_documents import RESTORE
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
    "load_storage_overrides",
    "load_stored_config",
    "load_stored_mapping",
    "load_stored_section",
    "parse_stored_text",
    "read_stored_config",
    "read_stored_text",
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


def load_storage_overrides(overrides: Sequence[str]) -> StorageSection:
    """Return the storage options that overrides set, for a command that gets a run's folder.

    Raises:
        ConfigError: an override is malformed, or sets another field.
    """
    mapping, problems = apply_overrides({}, overrides, is_text)
    problems = list(problems)
    for section in mapping:
        if section != "storage":
            problems.append(
                f"{section}: cannot be overridden, as the run is given by its folder. Allowed: "
                "storage.options. Give the run's config, or remove it."
            )
    if problems:
        raise ConfigError([redact(problem) for problem in problems], "command line")
    return load_stored_section(mapping, "storage", StorageSection, "command line")


def read_stored_text(store: Store) -> str:
    """Return the text of a run's stored config.

    Raises:
        ConfigError: it is not text, or larger than any config.
        StorageError: it is absent, or not a regular file.
    """
    content = store.read_at_most(STORED, yaml_documents.STORED.num_bytes)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError([f"not a text file (UTF-8). {RESTORE}"], _stored_name(store)) from error


def parse_stored_text(text: str, name: str) -> Mapping[str, Any]:
    """Return the mapping in the text of a stored config, with the field names of this version.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    try:
        documents, duplicates = yaml_documents.parse_yaml(text, yaml_documents.STORED)
    except yaml.YAMLError as error:
        line = yaml_documents.where(error)
        problem = redact(yaml_documents.reason(error))
        raise ConfigError([f"{line}not valid YAML: {problem}. {RESTORE}"], name) from error

    if duplicates:
        raise ConfigError(duplicates, name)
    if len(documents) != 1 or not isinstance(documents[0], Mapping):
        raise ConfigError([f"is no mapping of sections, as dist_ft writes it. {RESTORE}"], name)
    return renames.RUN.migrate(documents[0])


def read_stored_config(store: Store) -> Mapping[str, Any]:
    """Return a run's stored config as a mapping with the names of this version; {} without one.

    Raises:
        ConfigError: it is damaged; see `read_stored_text` and `parse_stored_text`.
    """
    if not store.exists(STORED):
        return {}
    return parse_stored_text(read_stored_text(store), _stored_name(store))


def _stored_name(store: Store) -> str:
    return store.redacted_url(STORED)


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
    require_no_credentials(config)

    # Unsorted, as people read it: run, model and data come first, as in their own file.
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=110)
