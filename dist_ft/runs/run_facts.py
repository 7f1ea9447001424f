"""What was run, from what a run keeps: model, data with its counts, seed, versions; for reports and model cards.

Says only what is stored; no path of the machine that reads it, no credential. Needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.checkpoint import discovery
from dist_ft.config.load import STORED
from dist_ft.core.errors import DistFtError
from dist_ft.core.logs import redact
from dist_ft.data.blocks import index_file as indices
from dist_ft.runtime.bootstrap.build_data import FOLDER
from dist_ft.storage.filesystem import Store

ENGINES = {"TorchEngine": "plain PyTorch", "DeepSpeedEngine": "DeepSpeed ZeRO"}
"""What engines are called in manifests, and what people call them."""


def stored_config(store: Store) -> dict[str, Any]:
    """Return the resolved config of a run as a mapping, without credentials."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(redact(store.read(STORED).decode()))
    return found


def facts(store: Store) -> dict[str, str]:
    """Return {what: value} of a run, in the order in which a reader asks."""
    config = stored_config(store)
    model, tuning, batch = config["model"], config.get("tuning") or {}, config.get("batch") or {}
    told = {
        "task": (config.get("task") or {}).get("name", "causal_lm").replace("_", " "),
        "base model": f"{model['path']}"
        + (f", revision {model['revision']}" if model.get("revision") else ""),
        "what learned": tuning.get("method", "full"),
        "training data": _data(store, config["data"].get("train"), "data.train"),
        "held-out data": _data(
            store, (config.get("evaluation") or {}).get("data"), "evaluation.data"
        ),
        "global batch": f"{batch.get('global_batch')} samples or sequences of at most "
        f"{batch.get('sequence_length')} tokens",
        "optimizer": _optimizer(config.get("optimizer") or {}, config.get("schedule") or {}),
        "seed": str(config["run"].get("seed", 0)),
    }
    return {**told, **_newest(store)}


def _data(store: Store, sources: Any, field: str) -> str:
    """Return the sources of a field, and how much they hold by the run's index."""
    if not sources:
        return "none"
    paths = ", ".join(
        str(source["path"] if isinstance(source, Mapping) else source)
        for source in (sources if isinstance(sources, list) else [sources])
    )
    try:
        index = indices.load(store, f"{FOLDER}/{field}")
    except DistFtError:
        index = None
    if index is None:
        return paths
    return (
        f"{paths}: {len(index.shards):,} shard{'s' if len(index.shards) != 1 else ''}, {index.num_samples:,} "
        f"samples, {index.total('num_tokens'):,} tokens"
    )


def _optimizer(section: Mapping[str, Any], schedule: Mapping[str, Any]) -> str:
    rate = section.get("learning_rate")
    return (
        f"{section.get('name', 'adamw')}, learning rate {rate:g}"
        if isinstance(rate, int | float)
        else str(section.get("name", "adamw"))
    ) + (f", {schedule['name']}" if schedule.get("name") else "")


def _newest(store: Store) -> dict[str, str]:
    """Return what the manifest of the newest readable checkpoint says of engine, workers and versions."""
    for name in discovery.committed(store):
        try:
            manifest = discovery.load_manifest(store, name)
        except DistFtError:
            continue
        engine = ENGINES.get(manifest.engine, manifest.engine)
        workers = f"{engine}, {manifest.world_size} worker{'s' if manifest.world_size != 1 else ''}"
        return {
            "trained": f"{manifest.progress.step:,} steps, {manifest.progress.num_tokens:,} tokens",
            "engine": workers,
            "saved": manifest.created_at,
            "versions": ", ".join(
                f"{name} {number}" for name, number in sorted(manifest.versions.items())
            ),
        }
    return {}
