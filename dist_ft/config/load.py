"""The door to a run's config: one YAML file (or a mapping) plus `section.field=value` overrides -> `RunConfig`.

Guarantees: whatever is wrong is said all at once, in one `ConfigError` whose lines name the field, what is allowed and
what to do. What is written back (`to_mapping`, `resolved_yaml`) loads to an equal config.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.config.assemble import assemble
from dist_ft.config.document import apply_overrides, name_of, read_document
from dist_ft.config.error_messages import is_text
from dist_ft.config.identity import Change, changes, check_resume, identity
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.core.logs import redact

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


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """Return `config` as nested plain values, every field spelt out; `load_config` takes it back."""
    return config.model_dump(mode="json")


def resolved_yaml(config: RunConfig) -> str:
    """Return `config` as YAML, every field spelt out, in the order of the schema."""
    import yaml

    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True, width=110)
