"""From a nested mapping to a `RunConfig`, and every reason why it is none.

Fields are checked one by one, so that a broken one hides no other: contradictions are then looked for in what is left
(a check that reads a broken field can't run and is skipped). A misspelt key counts as the key that was meant, so its
value is checked too. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dist_ft.config import renames
from dist_ft.config.checks.contradictions import contradictions
from dist_ft.config.error_messages import (
    missing_field,
    section_of,
    shown,
    unknown_key,
    wrong_value,
)
from dist_ft.config.schema import RunConfig, Section, Source

S = TypeVar("S", bound=Section)


def assemble(mapping: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """Return the config in `mapping` and all its problems: of fields first, then between fields.

    Broken fields are absent from the config; it is whole only if there are no problems.
    """
    problems: list[str] = []
    config = cast(RunConfig, _section(RunConfig, mapping, "", problems))
    return config, problems + contradictions(config, whole=not problems)


def assemble_stored(mapping: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """As `assemble` for a config that a run stored, perhaps with another version of dist_ft.

    Renamed fields are migrated; an unknown field is a problem. Contradictions are not checked: the run exists.
    """
    return assemble_stored_section(RunConfig, mapping, "")


def assemble_stored_section(
    model: type[S], mapping: Mapping[str, Any], name: str
) -> tuple[S, list[str]]:
    """As `assemble_stored` for the one section `name` of a stored config; its broken fields are absent."""
    migrated = renames.RUN.migrate(mapping, name)
    problems = list(_unknown_stored_fields(model, migrated, f"{name}." if name else ""))
    if problems:
        migrated = _without_unknown(model, migrated)
    section = cast(S, _section(model, migrated, name, problems))
    return section, problems


def _unknown_stored_fields(
    model: type[Section], mapping: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    """Yield a line for each key of a stored config that the schema does not have."""
    for key, value in mapping.items():
        if key not in model.model_fields:
            yield (
                f"{prefix}{key}: another version of dist_ft stored this field. This version does not know "
                "it. Use the version that stored it."
            )
            continue
        section = section_of(model.model_fields[key])
        if section and isinstance(value, Mapping):
            yield from _unknown_stored_fields(section, value, f"{prefix}{key}.")


def _without_unknown(model: type[Section], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return `mapping` without keys that the schema does not have."""
    known: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if name not in mapping:
            continue
        section, value = section_of(info), mapping[name]
        if section and isinstance(value, Mapping):
            value = _without_unknown(section, value)
        known[name] = value
    return known


def _section(model: type[Section], value: Any, path: str, problems: list[str]) -> Section:
    """Return the section in `value`; fields that are broken are absent from it (reading one is AttributeError)."""
    prefix = f"{path}." if path else ""
    if not isinstance(value, Mapping):
        if value is not None:
            problems.append(
                f"{path}={shown(value)}: not a section; allowed: a mapping with "
                f"{', '.join(model.model_fields)}; indent its fields below {path}:"
            )
            return _partial(model, {})
        value = {}
    given = _known(model, value, prefix, problems)
    good: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        section = section_of(info)
        if section:
            good[name] = _section(section, given.get(name), prefix + name, problems)
        elif name not in given:
            if info.is_required():
                problems.append(missing_field(prefix + name, info))
            else:
                good[name] = info.get_default(call_default_factory=True)
        else:
            _field(model, name, given[name], prefix + name, good, problems)
    return _partial(model, good)


def _known(
    model: type[Section], value: Mapping[str, Any], prefix: str, problems: list[str]
) -> dict[str, Any]:
    """Return the entries of `value` the section has; a misspelt one under the name that was meant."""
    given = {str(key): item for key, item in value.items() if str(key) in model.model_fields}
    for key, item in value.items():
        if str(key) in model.model_fields:
            continue
        path = f"{prefix}{key}"
        line, meant = renames.RUN.field_problem(path), renames.RUN.fields.get(path)
        if line is None:
            line, meant = unknown_key(path, item)
        problems.append(line)

        # Check the value as that of the field that was meant.
        parent, _, leaf = (meant or "").rpartition(".")
        if leaf in model.model_fields and parent == prefix.rstrip("."):
            given.setdefault(leaf, item)
    return given


def _field(
    model: type[Section],
    name: str,
    value: Any,
    path: str,
    good: dict[str, Any],
    problems: list[str],
) -> None:
    """Check one value: into `good` if the schema takes it, else a line for each thing wrong with it."""
    info = model.model_fields[name]
    renamed = renames.RUN.value_problem(path, value)
    if renamed is not None:
        problems.append(renamed)
        value = renames.RUN.new_value(path, value)
    if _not_a_number(value, info):
        problems.append(wrong_value(path, info, value))
        return
    try:
        good[name] = _adapter(model, name).validate_python(value)
    except ValidationError as error:
        problems.extend(_lines(path, info, value, error.errors(include_url=False)))


def _lines(path: str, info: FieldInfo, value: Any, errors: list[Any]) -> list[str]:
    """Return one line for the field, or one for each broken part of a list of sources."""
    parts = [error for error in errors if error["loc"] and isinstance(error["loc"][0], int)]
    return [_line(path, info, value, error) for error in parts or errors[-1:]]


def _line(path: str, info: FieldInfo, value: Any, error: Any) -> str:
    """Return the line for one of pydantic's errors within the field at `path`."""
    parts = error["loc"]
    if len(parts) == 1 and isinstance(parts[0], int):
        return (
            f"{path}.{parts[0]}={shown(error['input'])}: not a source; allowed: a path, or a mapping with "
            f"{', '.join(Source.model_fields)}; correct it"
        )
    in_source = bool(parts) and isinstance(parts[0], int) and len(parts) == 2
    inner = ".".join([path, *(str(part) for part in parts)])
    if in_source and error["type"] == "extra_forbidden":
        return f"{inner}: no such field; allowed: {', '.join(Source.model_fields)}; remove it"
    if in_source and error["type"] == "missing":
        return missing_field(inner, Source.model_fields[parts[1]])
    if in_source:
        return wrong_value(inner, Source.model_fields[parts[1]], error["input"], error["type"])
    return wrong_value(path, info, value, error["type"])


def _not_a_number(value: Any, info: FieldInfo) -> bool:
    """Tell whether `value` would pass as a number though it is none: true, infinity."""
    if isinstance(value, bool):
        return info.annotation is not bool
    return isinstance(value, float) and not math.isfinite(value)


@cache
def _adapter(model: type[Section], name: str) -> TypeAdapter[Any]:
    info = model.model_fields[name]
    kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    return TypeAdapter(kind)


def _partial(model: type[Section], good: dict[str, Any]) -> Section:
    """Return a section with the fields in `good` and no others."""
    section = model.model_construct(**good)
    for name in model.model_fields:
        if name not in good:
            vars(section).pop(name, None)
    return section
