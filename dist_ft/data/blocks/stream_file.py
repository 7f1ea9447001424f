"""The description of a run's stream: how its sources are cut, stored when the run starts.

It is what the index is to an indexed run: with it, a resumed run cuts the same slices, whatever a
later version would choose. It does not grow with the data; the shards are in a table next to it.
"""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import decode_json, encode_json
from dist_ft.core.logs import redact
from dist_ft.data.blocks.index import IndexRecipe
from dist_ft.data.sampling.stream_order import StreamLayout
from dist_ft.storage.documents import MAX_BYTES
from dist_ft.storage.filesystem import Store

FORMAT_VERSION = 1


class StreamedSource(BaseModel):
    """How a source is cut.

    Attributes:
        source: number of the source.
        num_bytes: bytes of its shards.
        num_blocks: blocks of equal bytes.
        slices_per_block: slices of equal bytes.
    """

    model_config = ConfigDict(frozen=True)

    source: int = Field(ge=0, lt=2**31)
    num_bytes: int = Field(gt=0, lt=2**62)
    num_blocks: int = Field(gt=0, lt=2**31)
    slices_per_block: int = Field(gt=0, lt=2**31)

    @classmethod
    def from_layout(cls, source: int, layout: StreamLayout) -> StreamedSource:
        """Return a source that is cut in this way."""
        return cls(source=source, **layout._asdict())

    @property
    def layout(self) -> StreamLayout:
        """How the source is cut."""
        return StreamLayout(self.num_bytes, self.num_blocks, self.slices_per_block)


class StreamDescription(BaseModel):
    """The stream of a run.

    Attributes:
        format_version: version of this description.
        sources: the sources that stream; the others are indexed.
        table: checksum of the table of shards.
        sizes: sequences of an epoch of each source, estimated for those that stream.
        recipe: what makes tokens of rows; empty before it is known.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    sources: tuple[StreamedSource, ...]
    table: str = Field(pattern=r"^[0-9a-f]{32}$")
    sizes: tuple[float, ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)

    @property
    def layouts(self) -> dict[int, StreamLayout]:
        """How each source that streams is cut."""
        return {own.source: own.layout for own in self.sources}


def save(description: StreamDescription, store: Store, name: str) -> None:
    """Write a description to `<name>.json`."""
    store.write(f"{name}.json", encode_json(description.model_dump(mode="json")))


def load(store: Store, name: str) -> StreamDescription | None:
    """Return the description stored as `<name>.json`, or None if the file does not exist.

    Raises:
        DataError: the file is damaged, or of another version.
    """
    path = f"{name}.json"
    if not store.exists(path):
        return None

    url = store.redacted_url(path)
    try:
        content = decode_json(store.read_at_most(path, MAX_BYTES))
        version = content.get("format_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(
                f"{url}: has format {version}. This version reads format {FORMAT_VERSION}. Update "
                "dist_ft."
            )
        return StreamDescription.model_validate(content)
    except (ValueError, pydantic.ValidationError) as error:
        first_line = str(error).splitlines()[0]
        raise DataError(
            redact(
                f"{url}: the stored description of the stream is damaged ({first_line}). Restore "
                "the file from a copy; without it the run cannot continue."
            )
        ) from error


def verify_recipe(description: StreamDescription, recipe: IndexRecipe) -> None:
    """Refuse a run whose rows become other tokens than when it started.

    Raises:
        DataError: names what differs.
    """
    differences = []
    for name, value in recipe.items():
        stored = description.recipe.get(name)
        if value != stored:
            differences.append(f"{name} was {stored}, is {value}")

    if differences:
        raise DataError(
            "data: samples become other tokens than when the run started "
            f"({'; '.join(differences)}). Tokenizer, template and data fields must not change. "
            "Restore them, or start a run with another run.name."
        )
