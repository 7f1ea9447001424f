"""Builds a `RunConfig` from a nested mapping, and finds all its problems.

Fields are checked one by one, so that a broken one hides no other. Contradictions are then checked
with the other fields (a check that reads a broken field is skipped). A misspelled or renamed key
counts as the key that was meant, so its value is checked too. Pure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Generic, TypeVar, cast, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from dist_ft.config import renames
from dist_ft.config.checks.contradictions import contradictions
from dist_ft.config.error_messages import (
    field_and_value,
    format_value,
    missing_field,
    section_of,
    unknown_key,
    wrong_value,
)
from dist_ft.config.schema import RunConfig, Section, Source

S = TypeVar("S", bound=Section)

MAX_INTEGER = 2**63 - 1
"""Largest whole number of a field: numpy and torch compute with 64 bits."""
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True)
class Assembled(Generic[S]):
    """A config or section, and a line for each problem.

    With problems, broken fields are absent: reading one raises AttributeError.
    """

    section: S
    problems: list[str]


def assemble(mapping: Mapping[str, Any]) -> Assembled[RunConfig]:
    """Return the config in `mapping`; problems of fields come first, then contradictions."""
    problems: list[str] = []
    config = cast(RunConfig, _section(RunConfig, mapping, "", problems))

    # A broken field must not hide contradictions elsewhere: users get all lines at once.
    return Assembled(config, problems + contradictions(config, whole=not problems))


def assemble_stored(mapping: Mapping[str, Any]) -> Assembled[RunConfig]:
    """As `assemble`, for a config that a run stored, perhaps with another version of dist_ft.

    Renamed fields are migrated; an unknown field is a problem. Contradictions are not checked: the
    run exists.
    """
    return assemble_stored_section(RunConfig, mapping, "")


def assemble_stored_section(model: type[S], mapping: Mapping[str, Any], name: str) -> Assembled[S]:
    """As `assemble_stored`, for the one section `name` of a stored config."""
    migrated = renames.RUN.migrate(mapping, name)

    # Unknown fields are taken out before the rest is checked. `_section` would report them as the
    # user's misspellings, with a remedy that does not fit a file that dist_ft wrote.
    prefix = f"{name}." if name else ""
    problems = list(_unknown_stored_fields(model, migrated, prefix))
    if problems:
        migrated = _without_unknown(model, migrated)

    section = cast(S, _section(model, migrated, name, problems))
    return Assembled(section, problems)


def _unknown_stored_fields(
    model: type[Section], mapping: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    """Yield a line for each key of a stored config that the schema does not have."""
    for key, value in mapping.items():
        if key not in model.model_fields:
            yield (
                f"{prefix}{key}: another version of dist_ft stored this field. This version does "
                "not know it. Use the version that stored it."
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

        value = mapping[name]
        section = section_of(info)
        if section and isinstance(value, Mapping):
            value = _without_unknown(section, value)
        known[name] = value
    return known


def _section(model: type[Section], value: Any, path: str, problems: list[str]) -> Section:
    """Return the section in `value` without broken fields; add a line for each to `problems`."""
    prefix = f"{path}." if path else ""
    if not isinstance(value, Mapping):
        if value is not None:
            problems.append(
                f"{field_and_value(path, value)}: not a section. Allowed: a mapping with "
                f"{', '.join(model.model_fields)}. Indent its fields below {path}:"
            )
            return _partial(model, {})

        # An absent section, or "data:" without lines below it, which YAML reads as null.
        value = {}

    # In the order of the schema, so that lines about fields do not depend on the file's order.
    given = _known_entries(model, value, prefix, problems)
    valid: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        section = section_of(info)
        if section:
            # Also if the section is absent: it may have required fields, each of which gets a line.
            valid[name] = _section(section, given.get(name), prefix + name, problems)
        elif name not in given:
            if info.is_required():
                problems.append(missing_field(prefix + name, info))
            else:
                valid[name] = info.get_default(call_default_factory=True)
        else:
            _field(model, name, given[name], prefix + name, valid, problems)

    return _partial(model, valid)


def _known_entries(
    model: type[Section], value: Mapping[str, Any], prefix: str, problems: list[str]
) -> dict[str, Any]:
    """Return the entries of `value` that the section has; a misspelled one under its right name."""
    # Correct keys first, so that a misspelled one never replaces the value of a correct one. YAML
    # keys may be numbers.
    given = {str(key): item for key, item in value.items() if str(key) in model.model_fields}
    for key, item in value.items():
        if str(key) in model.model_fields:
            continue

        # A renamed key has a certain answer; only other keys need a guess.
        path = f"{prefix}{key}"
        line = renames.RUN.field_problem(path)
        meant = renames.RUN.fields.get(path)
        if line is None:
            line, meant = unknown_key(path, item)
        problems.append(line)

        # Check the value as that of the field that was meant, unless that is in another section: it
        # has been checked, or will be, without this value.
        parent, _, leaf = (meant or "").rpartition(".")
        if leaf in model.model_fields and parent == prefix.rstrip("."):
            given.setdefault(leaf, item)

    return given


def _field(
    model: type[Section],
    name: str,
    value: Any,
    path: str,
    valid: dict[str, Any],
    problems: list[str],
) -> None:
    """Check one value: put it into `valid`, or add a line for each problem of it."""
    info = model.model_fields[name]

    # Continue with the new name of the value, which gets no second line as an invalid choice.
    renamed = renames.RUN.value_problem(path, value)
    if renamed is not None:
        problems.append(renamed)
        value = renames.RUN.new_value(path, value)

    if _has_unusable_text(value):
        problems.append(
            f"{path}={format_value(value)}: has NUL or half of a character (a lone surrogate), "
            "which no path or file can hold. Allowed: other text. Correct it."
        )
        return

    if _is_pseudo_number(value, info):
        problems.append(wrong_value(path, info, value))
        return

    try:
        valid[name] = _adapter(model, name).validate_python(value)
    except ValidationError as error:
        problems.extend(_lines(path, info, value, error.errors(include_url=False)))


def _lines(path: str, info: FieldInfo, value: Any, errors: list[Any]) -> list[str]:
    """Return one line for the field, or one for each broken item of a list of sources."""
    items = [error for error in errors if error["loc"] and isinstance(error["loc"][0], int)]

    # Without its broken items, pydantic also finds a list within an item too short.
    inner = {error["loc"][:2] for error in items if len(error["loc"]) > 2}
    items = [error for error in items if len(error["loc"]) != 2 or error["loc"] not in inner]

    # For a union pydantic has an error per member, all about the one value: a single line suffices.
    return [_line(path, info, value, error) for error in items or errors[-1:]]


def _line(path: str, info: FieldInfo, value: Any, error: Any) -> str:
    """Return the line for one of pydantic's errors within the field at `path`."""
    # (), or (index,) of an item, or (index, field, ...) within one.
    location = error["loc"]
    item = _item_section(info)
    if item is None or not (location and isinstance(location[0], int)):
        return wrong_value(path, info, value, error["type"])

    item_path = f"{path}.{location[0]}"
    if len(location) == 1:
        kind, allowed_form = "section", f"a mapping with {', '.join(item.model_fields)}"
        if item is Source:
            kind, allowed_form = "source", f"a path, or {allowed_form}"
        return (
            f"{item_path}={format_value(error['input'])}: not a {kind}. "
            f"Allowed: {allowed_form}. Correct it."
        )

    name = str(location[1])
    field_path = f"{item_path}.{name}"
    if name not in item.model_fields:
        fields = ", ".join(item.model_fields)
        return f"{field_path}: no such field. Allowed: {fields}. Remove it."
    if error["type"] == "missing":
        return missing_field(field_path, item.model_fields[name])

    # Of a list in an item, the whole list: what is allowed is said of it.
    wrong = error["input"]
    if len(location) > 2:
        wrong = value[location[0]][name]
    return wrong_value(field_path, item.model_fields[name], wrong, error["type"])


def _item_section(info: FieldInfo) -> type[Section] | None:
    """Return the class of the items of a list of sections; None for any other field."""
    for part in get_args(info.annotation):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _is_pseudo_number(value: Any, info: FieldInfo) -> bool:
    """Whether pydantic would take `value` for a number although none can compute with it.

    That is true, infinity, and whole numbers of more than 64 bits.
    """
    # bool is a subclass of int in Python, so true would count as 1.
    if isinstance(value, bool):
        return info.annotation is not bool
    if isinstance(value, int):
        return abs(value) > MAX_INTEGER
    return isinstance(value, float) and not math.isfinite(value)


def _has_unusable_text(value: Any) -> bool:
    """Whether a text in `value` has a character that no file or terminal can be given."""
    if isinstance(value, Mapping):
        return any(_has_unusable_text(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple):
        return any(_has_unusable_text(item) for item in value)
    return isinstance(value, str) and _NO_TEXT.search(value) is not None


# Building an adapter compiles a validator. A search assembles the config of every trial.
@cache
def _adapter(model: type[Section], name: str) -> TypeAdapter[Any]:
    info = model.model_fields[name]

    # pydantic keeps bounds and validators apart from the type; together they check as the model.
    kind: Any = info.annotation
    if info.metadata:
        kind = Annotated[(info.annotation, *info.metadata)]
    return TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False))


def _partial(model: type[Section], valid: dict[str, Any]) -> Section:
    """Return a section with the fields in `valid` and no others."""
    # model_construct checks nothing, but fills in defaults: without this, a check would read the
    # default of a broken field and report a contradiction that the file does not have.
    section = model.model_construct(**valid)
    for name in model.model_fields:
        if name not in valid:
            vars(section).pop(name, None)
    return section
