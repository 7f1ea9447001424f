"""Config fields and values that were renamed since version 0.1.0, with their old names.

An old name in a user's file is an error that gives the new name. Configs that a run, a search or an
exported model stored are migrated, and hashes of fields still use their old names. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERSION = "0.2"
"""The version that renamed them."""


@dataclass(frozen=True)
class Renames:
    """Renamed fields and values of one kind of document.

    Attributes:
        fields: old dotted path -> new dotted path, in the same section.
        values: new dotted path of a field -> {old value: new value}.
    """

    fields: Mapping[str, str]
    values: Mapping[str, Mapping[str, str]]

    def migrate(self, document: Mapping[str, Any], section: str = "") -> dict[str, Any]:
        """Return a stored document, or the one `section` of it, with the names of this version."""
        return _renamed(document, section, self.fields, self.values)

    def restore(self, document: Mapping[str, Any], section: str = "") -> dict[str, Any]:
        """Return a document, or the one `section` of it, with the names of 0.1.0, for hashes."""
        # Caches and stored results are found by a hash of the fields they depend on. With the new
        # names every hash would change, and old runs could not use theirs any more.
        fields = {new: old for old, new in self.fields.items()}

        # `_renamed` looks values up by the new path of a field, which here is the old name.
        values = {}
        for path, renamed in self.values.items():
            old_path = fields.get(path, path)
            values[old_path] = {new: old for old, new in renamed.items()}
        return _renamed(document, section, fields, values)

    def problems(self, document: Mapping[str, Any]) -> list[str]:
        """Return a line for each old name at the top level of a user's document."""
        found: list[str | None] = []
        for field, value in document.items():
            path = str(field)
            found.append(self.field_problem(path))

            # Old values are listed by the new path of their field.
            found.append(self.value_problem(self.fields.get(path, path), value))
        return [line for line in found if line is not None]

    def field_problem(self, path: str) -> str | None:
        """Return the line for a user's field at `path`; None if that is no old name."""
        new = self.fields.get(path)
        if not new:
            return None
        return f"{path}: renamed to {new} in {VERSION}. Rename it."

    def new_value(self, path: str, value: Any) -> Any:
        """Return the new name of the `value` of the field at `path`, or `value` itself."""
        # Not checked yet: a value may be a list, which is no key of a dictionary.
        if not isinstance(value, str):
            return value
        return self.values.get(path, {}).get(value, value)

    def value_problem(self, path: str, value: Any) -> str | None:
        """Return the line for a user's `value` of the field at `path`; None if not renamed."""
        new = self.new_value(path, value)
        if new == value:
            return None
        return f"{path}={value}: renamed to {new} in {VERSION}. Write {path}={new}."


def _renamed(
    document: Mapping[str, Any],
    section: str,
    fields: Mapping[str, str],
    values: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in document.items():
        path = f"{section}.{key}" if section else str(key)
        if path in fields:
            path = fields[path]
            key = path.rpartition(".")[2]

        # Sources are lists of mappings and are not searched: no field in them was renamed.
        if isinstance(value, Mapping):
            value = _renamed(value, path, fields, values)
        elif isinstance(value, str):
            value = values.get(path, {}).get(value, value)
        renamed[key] = value

    return renamed


# Entries are never removed: a run that 0.1.0 stored may be resumed, or compared, at any time.
RUN = Renames(
    fields={
        "prompting.verbalisers": "prompting.verbalizers",
        "prompting.normalise": "prompting.normalize",
        "task.masked_share": "task.mask_probability",
        "data.augment.share": "data.augment.probability",
        "checkpoint.node_folder": "checkpoint.local_folder",
        "checkpoint.node_every_steps": "checkpoint.local_every_steps",
        "evaluation.of": "evaluation.weights",
        "evaluation.keep_texts": "evaluation.keep_generations",
        "evaluation.decoding.rows": "evaluation.decoding.batch_size",
        "anomaly.most_in_a_row": "anomaly.max_consecutive",
    },
    values={
        "evaluation.weights": {"weights": "trained"},
        "model.checkpoint": {"newest": "latest"},
    },
)
"""Renames in a run's config, and in its sections that exported models store."""

SEARCH = Renames(fields={"at_once": "max_concurrent"}, values={})
"""Renames in the file of `dist-ft tune`, and in the files that a search stores."""

STAGES = Renames(fields={"begin": "checkpoint"}, values={"checkpoint": {"newest": "latest"}})
"""Renames in the file of `dist-ft stages`."""
