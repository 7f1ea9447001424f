"""Which config fields may change when a run is resumed.

Identity fields (marked in the schema) decide which samples and which model a run is about; they
must not change. All others are operational: they may change, and changes are returned. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from dist_ft.config.assemble import assemble_stored
from dist_ft.config.error_messages import format_value
from dist_ft.config.schema import RunConfig, Section
from dist_ft.core.errors import ConfigError


class Change(NamedTuple):
    """A field that differs: its dotted path, the old value and the new one (None: absent)."""

    path: str
    old: Any
    new: Any


def identity(config: RunConfig) -> Mapping[str, Any]:
    """Return the values of all identity fields by dotted path; with indices (data.train.0.path)."""
    return {field.path: field.value for field in _fields(config) if field.is_identity}


class Changes(NamedTuple):
    """Differences of two configs, in the order of the schema."""

    identity: list[Change]
    operational: list[Change]


def changes(old: RunConfig, new: RunConfig) -> Changes:
    """Return what differs from `old` to `new`."""
    before = {field.path: field for field in _fields(old)}
    after = {field.path: field for field in _fields(new)}

    # Over the paths of both: a source that was added to a list or removed from it is on one side.
    found = Changes([], [])
    for path in dict.fromkeys([*before, *after]):
        old_value = before[path].value if path in before else None
        new_value = after[path].value if path in after else None
        if old_value == new_value:
            continue

        change = Change(path, old_value, new_value)
        field = before.get(path) or after[path]
        if field.is_identity:
            found.identity.append(change)
        else:
            found.operational.append(change)

    return found


def check_resume(old_mapping: Mapping[str, Any], new_config: RunConfig) -> list[Change]:
    """Return the operational changes from a stored run's config to `new_config`.

    Fields that the stored mapping lacks (an older version wrote it) have their defaults; renamed
    ones are migrated.

    Raises:
        ConfigError: names every identity field that changed, or every stored field that this
            version does not know.
    """
    name = new_config.run.name

    # Stored configs are not checked for contradictions: checks of a newer version must not refuse
    # a run that is half done.
    stored = assemble_stored(old_mapping)
    if stored.problems:
        remedy = f"(Use another run.name than {name!r} if the run cannot be repaired.)"
        raise ConfigError(
            [f"{problem} {remedy}" for problem in stored.problems],
            f"stored config of run {name!r}",
        )

    identity_changes, operational_changes = changes(stored.section, new_config)
    if identity_changes:
        lines = [_refusal(change, name) for change in identity_changes]
        raise ConfigError(lines, f"resume of run {name!r}")

    return operational_changes


def _refusal(change: Change, name: str) -> str:
    return (
        f"{change.path}={format_value(change.new)}: the stored run {name!r} has "
        f"{format_value(change.old)}, and this must not change when a run is resumed. Restore "
        f"{format_value(change.old)}, or use another run.name."
    )


class _FieldValue(NamedTuple):
    """A field by dotted path, its plain value, and whether it is an identity field."""

    path: str
    value: Any
    is_identity: bool


def _fields(section: Section, prefix: str = "") -> Iterator[_FieldValue]:
    """Yield all fields below `section`; lists of identity sections by item."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        path = prefix + name
        is_identity = _is_identity(info)

        # A section in a union (cluster.workers) is one value: it may be a number next time.
        if isinstance(value, Section) and info.annotation is type(value):
            yield from _fields(value, f"{path}.")

        # By item, so that a refusal names the source that changed rather than the whole list.
        elif isinstance(value, tuple) and value and isinstance(value[0], Section) and is_identity:
            for index, item in enumerate(value):
                yield from _fields(item, f"{path}.{index}.")

        else:
            # As plain JSON values: both sides compare equal whatever Python types they came from.
            plain = section.model_dump(mode="json", include={name})[name]
            yield _FieldValue(path, plain, is_identity)


def _is_identity(info: FieldInfo) -> bool:
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get("identity"))
