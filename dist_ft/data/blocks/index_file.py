"""The stored form of an index: one JSON file with the run, checked by its checksum."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.block import Block, Part
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.segments import Measures
from dist_ft.data.sources.discovery import Shard
from dist_ft.storage.filesystem import Store

FORMAT = 2


def save(index: Index, store: Store, name: str) -> None:
    """Write `<name>.json`: shards (URL, kind, size, version), blocks with their rows, tokens and checksums, recipe."""
    import xxhash

    names = [field.name for field in fields(Measures)]
    body = json.dumps(
        {
            "recipe": index.recipe,
            "shards": [[*asdict(shard).values()] for shard in index.shards],
            "shard_sources": index.shard_sources,
            "blocks": [
                [block.source, [[*asdict(part).values()] for part in block.parts]]
                for block in index.blocks
            ],
            "measure": names,
            "measures": [[getattr(found, field) for field in names] for found in index.measures],
        }
    )
    head = json.dumps({"format": FORMAT, "checksum": xxhash.xxh3_128_hexdigest(body.encode())})
    store.write(f"{name}.json", f"{head}\n{body}\n".encode())


def load(store: Store, name: str) -> Index | None:
    """Return a stored index, or None if there is none.

    Raises:
        DataError: it is damaged or of another format.
    """
    import xxhash

    if not store.exists(f"{name}.json"):
        return None
    where = redact(store.full(f"{name}.json"))
    try:
        head, _, body = store.read(f"{name}.json").partition(b"\n")
        about = json.loads(head)
        if about["format"] != FORMAT:
            raise DataError(
                f"{where}: is of format {about['format']}; this version reads {FORMAT}; remove the file, "
                "and the index is made again"
            )
        body = body.removesuffix(b"\n")
        if xxhash.xxh3_128_hexdigest(body) != about["checksum"]:
            raise ValueError("the checksum differs")
        found = json.loads(body)
        measures = [
            dict(zip(found["measure"], values, strict=True)) for values in found["measures"]
        ]
        return Index(
            tuple(Shard(*values) for values in found["shards"]),
            tuple(found["shard_sources"]),
            tuple(
                Block(source, tuple(Part(*values) for values in parts))
                for source, parts in found["blocks"]
            ),
            tuple(
                Measures(**{**values, "part_rows": tuple(values["part_rows"])})
                for values in measures
            ),
            found["recipe"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: the stored index is damaged ({error}); remove the file, and the index is made "
            "again from the same shards"
        ) from error
