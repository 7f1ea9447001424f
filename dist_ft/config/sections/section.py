"""Base of all sections: frozen, unknown keys refused, identity fields marked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def Identity(*args: Any, **kwargs: Any) -> Any:
    """Return a `Field` that must not change when a run is resumed."""
    return Field(*args, json_schema_extra={"identity": True}, **kwargs)


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def is_default(self, field: str) -> bool:
        """Whether `field` has the default of the schema."""
        return bool(getattr(self, field) == type(self).model_fields[field].default)


def as_tuple(value: object) -> object:
    """Accept a single text in place of a list of one."""
    return (value,) if isinstance(value, str) else value
