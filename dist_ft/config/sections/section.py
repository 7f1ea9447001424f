"""Base class of config sections, and the mark of fields that identify a run."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def Identity(*args: Any, **kwargs: Any) -> Any:
    """Return a pydantic `Field` whose value must not change when a run is resumed.

    Takes the arguments of `Field`, except json_schema_extra, which stores the mark.
    """
    # In the field's own metadata, so that the mark cannot get out of step with the field.
    return Field(*args, json_schema_extra={"identity": True}, **kwargs)


class Section(BaseModel):
    """Base class of all sections: immutable; an unknown key is an error."""

    # pydantic would ignore unknown keys: a misspelled field would silently keep its default. And it
    # would take infinity for a number.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def is_default(self, field: str) -> bool:
        """Whether the value of `field` equals its default in the schema."""
        return bool(getattr(self, field) == type(self).model_fields[field].default)


def as_tuple(value: object) -> object:
    """Return a string as a tuple of one string, and any other value unchanged."""
    # tuple() of a string would be its characters.
    if isinstance(value, str):
        return (value,)
    return value
