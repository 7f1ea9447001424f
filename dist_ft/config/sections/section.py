"""What all sections of a config share: frozen, no unknown keys, fields that make a run what it is marked."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def Identity(*args: Any, **kwargs: Any) -> Any:
    """Return a `Field` that must not change when a run is resumed."""
    return Field(*args, json_schema_extra={"identity": True}, **kwargs)


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")
