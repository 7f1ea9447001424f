"""The index: how long every sample is, and which pieces of it are trained on.

Made once (each shard tokenised by one rank, lengths gathered) and stored with the run, so that a resumed run plans
the same steps without reading the data again. Guarantees: every rank holds the same index or raises the same error;
a shard that changed or vanished since is refused by name. Holds numbers only, no tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.data import pieces as cutting
from dist_ft.data.cache import TokenCache
from dist_ft.data.pieces import Measures
from dist_ft.data.source import Shard
from dist_ft.errors import DataError, DistFtError
from dist_ft.logs import redact
from dist_ft.storage import Store
from dist_ft.world import Collectives, World

FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """All samples of a data set. Sample ids count rows over all shards, from 0; P pieces are trained on.

    Attributes:
        shards: the shards, in order.
        row_offsets: (len(shards) + 1,) int64: shard s holds the samples row_offsets[s] .. row_offsets[s + 1] - 1.
        lengths: (N,) int32 tokens of every sample, uncut.
        target_counts: (N,) int32 learned tokens of every sample, uncut.
        pieces: (P, 3) int64 [sample id, first token, number of tokens], in order; each at most one sequence long.
        piece_targets: (P,) int32 targets of every piece (a piece's first token is never one: nothing precedes it).
        recipe: what decided all this: encoder fingerprint, overlong policy, sequence length.
    """

    shards: tuple[Shard, ...]
    row_offsets: np.ndarray
    lengths: np.ndarray
    target_counts: np.ndarray
    pieces: np.ndarray
    piece_targets: np.ndarray
    recipe: Mapping[str, Any]

    @property
    def num_samples(self) -> int:
        """N: rows of all shards, those left out too."""
        return len(self.lengths)

    @property
    def num_pieces(self) -> int:
        """P: pieces an epoch trains on."""
        return len(self.pieces)

    @property
    def num_left_out(self) -> int:
        """Samples of which no piece is trained on (dropped, or nothing to learn in them)."""
        return self.num_samples - len(np.unique(self.pieces[:, 0]))

    def place(self, sample: int) -> tuple[Shard, int]:
        """Return the shard of a sample and its row there, from 0."""
        shard = int(np.searchsorted(self.row_offsets, sample, side="right")) - 1
        return self.shards[shard], int(sample - self.row_offsets[shard])

    def first(self, num_samples: int) -> Index:
        """Return the index of the first `num_samples` samples only (0: all)."""
        if not num_samples:
            return self
        kept = self.pieces[:, 0] < num_samples
        return replace(self, pieces=self.pieces[kept], piece_targets=self.piece_targets[kept])

    def verify_unchanged(self, shards: Sequence[Shard], field: str = "data.train") -> None:
        """Refuse, by name, data that is not what was indexed.

        Raises:
            DataError: a shard was changed, removed, added or moved in order.
        """
        now = {shard.url: shard for shard in shards}
        then = {shard.url for shard in self.shards}
        advice = ("a run keeps the data it began with; restore it, or start a run with another run.name")
        for shard in self.shards:
            if shard.url not in now:
                raise DataError(redact(f"{field}: the shard {shard.url} vanished since the run began; {advice}"))
            if now[shard.url] != shard:
                raise DataError(redact(f"{field}: the shard {shard.url} changed since the run began; {advice}"))
        for shard in shards:
            if shard.url not in then:
                raise DataError(redact(f"{field}: the shard {shard.url} is new since the run began; {advice}"))
        if tuple(shards) != self.shards:
            raise DataError(f"{field}: the shards are in another order than when the run began; {advice}")

    def verify_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Refuse an index made with another tokenizer, template, overlong policy or sequence length.

        Raises:
            DataError: names what differs.
        """
        differing = [name for name in recipe if recipe[name] != self.recipe.get(name)]
        if differing:
            what = "; ".join(f"{name} was {self.recipe.get(name)}, is {recipe[name]}" for name in differing)
            raise DataError(f"data: samples become other tokens than when the run began ({what}); tokenizer, template "
                            "and data fields may not change; restore them, or start a run with another run.name")

    def save(self, store: Store, name: str = "index") -> None:
        """Write `<name>.safetensors`, then `<name>.json`, which makes it exist."""
        import xxhash
        from safetensors.numpy import save

        body = save({key: np.ascontiguousarray(getattr(self, key)) for key in _ARRAYS})
        about = {"format": FORMAT, "checksum": xxhash.xxh3_128_hexdigest(body), "recipe": dict(self.recipe),
                 "shards": [asdict(shard) for shard in self.shards]}
        store.write(f"{name}.safetensors", body)
        store.write(f"{name}.json", json.dumps(about, indent=1).encode())


_ARRAYS = ("row_offsets", "lengths", "target_counts", "pieces", "piece_targets")


def load(store: Store, name: str = "index") -> Index | None:
    """Return a stored index, or None if there is none.

    Raises:
        DataError: it is damaged or of another format.
    """
    import xxhash
    from safetensors.numpy import load as unpack

    if not store.exists(f"{name}.json"):
        return None
    where = redact(store.full(f"{name}.json"))
    try:
        about = json.loads(store.read(f"{name}.json"))
        if about["format"] != FORMAT:
            raise DataError(f"{where}: is of format {about['format']}; this version reads {FORMAT}; remove the file, "
                            "and the index is made again")
        body = store.read(f"{name}.safetensors")
        if xxhash.xxh3_128_hexdigest(body) != about["checksum"]:
            raise ValueError("the checksum differs")
        shards = tuple(Shard(**shard) for shard in about["shards"])
        return Index(shards=shards, recipe=about["recipe"], **unpack(body))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: the stored index is damaged ({error}); remove the file, and the index is made "
                        "again from the same shards") from error


def recipe(cache: TokenCache, data: DataSection, sequence_length: int) -> dict[str, Any]:
    """Return what decides an index besides its shards."""
    return {"encoder": cache.fingerprint, "overlong": data.overlong, "sequence_length": sequence_length}


def build(shards: Sequence[Shard], cache: TokenCache, data: DataSection, sequence_length: int,
          world: World, collectives: Collectives) -> Index:
    """Tokenise every shard on one rank (shard i on rank i % size), exchange lengths, return the same on every rank.

    Raises:
        DataError: on all ranks with the same text: what any rank met, or samples longer than `sequence_length` (in
            tokens) under data.overlong=error, or nothing to learn at all.
    """
    own: dict[int, Measures] = {}
    failure: tuple[int, DistFtError] | None = None
    for number in range(world.rank, len(shards), world.size):
        try:
            tokenised = cache.shard(shards[number])
            own[number] = cutting.measure(tokenised, sequence_length, data.overlong)
        except Exception as error:  # a rank that raised alone would leave the others waiting
            told = error if isinstance(error, DistFtError) else DataError(
                redact(f"{shards[number].url}: can not be tokenised ({type(error).__name__}: {error})"))
            failure = (number, told)
            break
    failures = [found for found in collectives.all_gather(failure) if found is not None]
    if failures:
        raise min(failures, key=lambda found: found[0])[1]
    measures: dict[int, Measures] = {}
    for part in collectives.all_gather(own):
        measures.update(part)
    index = _join(tuple(shards), [measures[i] for i in range(len(shards))], recipe(cache, data, sequence_length))
    cutting.judge(index.lengths, [measures[i].format for i in range(len(shards))], index.shards, index.row_offsets,
                  sequence_length, data.overlong)
    _refuse_nothing(index)
    if index.num_left_out and world.rank == 0:
        log.warning("%d of %d samples are left out: too long, or nothing to learn within batch.sequence_length=%d",
                    index.num_left_out, index.num_samples, sequence_length)
    return index


def _join(shards: tuple[Shard, ...], measures: Sequence[Measures], how: Mapping[str, Any]) -> Index:
    """Put the shards' measures one after the other, rows becoming sample ids."""
    rows = np.array([0, *(len(measure.lengths) for measure in measures)], dtype=np.int64)
    row_offsets = np.cumsum(rows)
    shifted = [measure.pieces + np.array([start, 0, 0])
               for measure, start in zip(measures, row_offsets[:-1], strict=True)]
    return Index(
        shards, row_offsets,
        np.concatenate([np.empty(0, np.int32), *(measure.lengths for measure in measures)]),
        np.concatenate([np.empty(0, np.int32), *(measure.target_counts for measure in measures)]),
        np.concatenate([np.empty((0, 3), np.int64), *shifted]),
        np.concatenate([np.empty(0, np.int32), *(measure.piece_targets for measure in measures)]), dict(how))


def _refuse_nothing(index: Index) -> None:
    if not index.num_samples:
        raise DataError("data: holds no sample; at least one is needed; check the sources")
    if not index.num_pieces:
        raise DataError(f"data: none of the {index.num_samples} samples has a token to learn within "
                        f"batch.sequence_length={index.recipe['sequence_length']}; raise it, or check data.targets, "
                        "data.overlong and the chat template")
