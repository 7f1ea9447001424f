"""What may change when a run is resumed, and what may not.

Identity fields (marked in the schema) decide which samples and which model a run is about; a resume must not change
them. All others are operational: they may change, and the change is returned so that it can be recorded. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from dist_ft.config.assemble import assemble_stored
from dist_ft.config.error_messages import shown
from dist_ft.config.schema import RunConfig, Section
from dist_ft.core.errors import ConfigError


class Change(NamedTuple):
    """One field that differs: its dotted path, the old value and the new one (None: not there)."""

    path: str
    old: Any
    new: Any


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the value of every identity field by dotted path; elements of lists by index (data.train.0.path)."""
    return {path: value for path, value, is_identity in _fields(config) if is_identity}


def changes(old: RunConfig, new: RunConfig) -> tuple[list[Change], list[Change]]:
    """Return what differs from `old` to `new`: identity fields first, then operational ones."""
    before = {path: (value, is_identity) for path, value, is_identity in _fields(old)}
    after = {path: (value, is_identity) for path, value, is_identity in _fields(new)}
    found: tuple[list[Change], list[Change]] = ([], [])
    for path in dict.fromkeys([*before, *after]):
        was, is_identity = before.get(path, (None, after.get(path, (None, False))[1]))
        now = after.get(path, (None, False))[0]
        if was != now:
            found[0 if is_identity else 1].append(Change(path, was, now))
    return found


def check_resume(old_mapping: Mapping[str, Any], new_config: RunConfig) -> list[Change]:
    """Return the operational changes from a stored run's config to `new_config`.

    Fields that the stored mapping lacks (an older version wrote it) have their defaults; renamed ones are migrated.

    Raises:
        ConfigError: names every identity field that changed, and every stored field that this version does not know.
    """
    name = new_config.run.name
    old, problems = assemble_stored(old_mapping)
    if problems:
        raise ConfigError(
            [
                f"{problem} (choose another run.name than {name!r} if this run can't be repaired)"
                for problem in problems
            ],
            f"stored config of run {name!r}",
        )
    identity_changes, operational_changes = changes(old, new_config)
    if identity_changes:
        raise ConfigError(
            [_refusal(change, name) for change in identity_changes], f"resume of run {name!r}"
        )
    return operational_changes


def _refusal(change: Change, name: str) -> str:
    return (
        f"{change.path}={shown(change.new)}: the stored run {name!r} was made with {shown(change.old)}, and this "
        f"must not change when a run is resumed; restore {shown(change.old)}, or choose another run.name"
    )


def _fields(section: Section, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """Yield (dotted path, plain value, whether it is identity) of all fields below `section`."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        path, is_identity = prefix + name, _is_identity(info)
        if isinstance(value, Section) and info.annotation is type(value):
            yield from _fields(value, f"{path}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section) and is_identity:
            for index, item in enumerate(value):
                yield from _fields(item, f"{path}.{index}.")
        else:
            yield path, section.model_dump(mode="json", include={name})[name], is_identity


def _is_identity(info: FieldInfo) -> bool:
    return isinstance(info.json_schema_extra, dict) and bool(info.json_schema_extra.get("identity"))
