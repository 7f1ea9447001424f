"""From config to loaders: shards, tokenizer, cache, index (made once, stored with the run), plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_ft.config.schema import DataSection, RunConfig, Sources
from dist_ft.data import index as indices
from dist_ft.data.cache import TokenCache
from dist_ft.data.loader import Loader
from dist_ft.data.plan import Plan
from dist_ft.data.source import resolve
from dist_ft.data.template import Encoder
from dist_ft.model.load import cache_folder, load_tokenizer
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0

FOLDER = "data"


@dataclass(frozen=True)
class Data:
    """What a run reads: its tokenizer, and a loader over training and held-out data (None without any)."""

    tokenizer: Any
    training: Loader
    evaluation: Loader | None


def open_data(config: RunConfig, store: Store, world: World, collectives: Collectives) -> Data:
    """Return the loaders of a run; a collective call. Every rank ends with the same index or the same error."""
    tokenizer = load_tokenizer(config.model, config.data.cache_dir)
    training = _loader(config, config.data, config.data.train, "data.train", tokenizer, store, world, collectives)
    evaluation = None
    if config.evaluation.data:
        section = config.data.model_copy(update={"shuffle": False})
        evaluation = _loader(config, section, config.evaluation.data, "evaluation.data", tokenizer, store, world,
                             collectives, config.evaluation.max_samples)
    return Data(tokenizer, training, evaluation)


def _loader(config: RunConfig, section: DataSection, sources: Sources, field: str, tokenizer: Any, store: Store,
            world: World, collectives: Collectives, max_samples: int = 0) -> Loader:
    """Return the loader over `sources`, with the run's stored index if there is one."""
    cache = TokenCache(cache_folder(config.data.cache_dir) / "tokens", Encoder(tokenizer, section))
    name = f"{FOLDER}/{field}"
    stored = on_rank0(world, collectives, lambda: indices.load(store, name))
    shards = on_rank0(world, collectives, lambda: resolve(sources, field))
    if stored is not None and (field == "data.train" or stored.shards == shards):
        stored.verify_unchanged(shards, field)
        stored.verify_recipe(indices.recipe(cache, section, config.batch.sequence_length))
        index = stored
    else:
        index = indices.build(shards, cache, section, config.batch.sequence_length, world, collectives)
        on_rank0(world, collectives, lambda: index.save(store, name))
    if max_samples:
        index = index.first(max_samples)
    return Loader(Plan(index, section, config.batch, config.run.seed), index, cache, config.batch)
