"""The door to a run's config: one YAML file (or a mapping) plus `section.field=value` overrides -> `RunConfig`.

Guarantees: whatever is wrong is said all at once, in one `ConfigError` whose lines name the field, what is allowed and
what to do. What is written back (`to_mapping`, `resolved_yaml`) loads to an equal config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dist_ft.config import renames
from dist_ft.config.assemble import assemble, assemble_stored, assemble_stored_section
from dist_ft.config.document import apply_overrides, name_of, parse_yaml, read_document
from dist_ft.config.error_messages import is_text
from dist_ft.config.identity import Change, changes, check_resume, identity
from dist_ft.config.schema import RunConfig, Section
from dist_ft.core.errors import ConfigError
from dist_ft.core.logs import redact
from dist_ft.storage.filesystem import Store

S = TypeVar("S", bound=Section)

STORED = "run.yaml"
"""Where a run keeps its resolved config, in its own folder."""

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
    """Return the config in a YAML file (path or fsspec URL) or a nested mapping, with `overrides` applied.

    Raises `ConfigError` with every problem there is: unknown keys (and what was probably meant), values of a wrong
    kind, missing fields, contradictions between fields.
    """
    config, problems, source = inspect_config(path_or_mapping, overrides)
    if problems:
        raise ConfigError(problems, source)
    return config


def inspect_config(
    path_or_mapping: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> tuple[RunConfig, list[str], str]:
    """As `load_config`, but return (what could be understood, all problems, the source's name) for further probing.

    Where there are problems, broken fields are absent from the config: reading one raises AttributeError. A file that
    can't be read at all still raises `ConfigError`.
    """
    twice: list[str] = []
    if isinstance(path_or_mapping, Mapping):
        source, document = "config", dict(path_or_mapping)
    else:
        source = os.fspath(path_or_mapping)
        document, twice = read_document(source)
    mapping, broken = apply_overrides(document, overrides, is_text)
    config, wrong = assemble(mapping)
    return config, [redact(problem) for problem in (*twice, *broken, *wrong)], name_of(source)


def read_stored_config(store: Store) -> dict[str, Any]:
    """Return the stored config of the run at `store` as a mapping with the names of this version; {} without one."""
    if not store.exists(STORED):
        return {}
    stored, _ = parse_yaml(store.read(STORED).decode())
    return renames.RUN.migrate(stored) if isinstance(stored, Mapping) else {}


def load_stored_config(store: Store) -> RunConfig:
    """Return the stored config of the run at `store`.

    Raises:
        ConfigError: a field is broken, missing, or unknown to this version.
    """
    return load_stored_mapping(read_stored_config(store), store.redacted_url(STORED))


def load_stored_mapping(mapping: Mapping[str, Any], source: str) -> RunConfig:
    """Return the config in a mapping that an earlier start stored in `source`; see `load_stored_config`."""
    config, problems = assemble_stored(mapping)
    if problems:
        raise ConfigError(problems, source)
    return config


def load_stored_section(
    document: Mapping[str, Any], name: str, model: type[S], source: str
) -> S:
    """Return the section `name` of a document stored in `source`; its defaults if the document lacks it.

    Raises:
        ConfigError: a field is broken, or unknown to this version.
    """
    section, problems = assemble_stored_section(model, document.get(name) or {}, name)
    if problems:
        raise ConfigError(problems, source)
    return section


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Return `config` as nested plain values, every field spelt out; `load_config` takes it back."""
    return config.model_dump(mode="json")


def resolved_yaml(config: RunConfig) -> str:
    """Return `config` as YAML, every field spelt out, in the order of the schema."""
    import yaml

    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=110)
