"""Facts of a run from its storage: model, data with counts, seed, versions.

Used by reports and model cards. Contains only what is stored: no path of the machine that reads
it, no credential. Needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ft.checkpoint import discovery
from dist_ft.config.load import STORED, parse_stored_text, read_stored_text
from dist_ft.core.errors import DistFtError
from dist_ft.core.json_documents import interpreting
from dist_ft.core.redaction import redact_values
from dist_ft.data.blocks import index_file as indices
from dist_ft.runtime.bootstrap.build_data import FOLDER
from dist_ft.storage.filesystem import Store

ENGINE_TITLES = {"TorchEngine": "plain PyTorch", "DeepSpeedEngine": "DeepSpeed ZeRO"}
"""Name of an engine in manifests -> its name for people."""


def stored_config(store: Store) -> Mapping[str, Any]:
    """Return the resolved config of a run as a mapping, without credentials."""
    # The plain mapping rather than a RunConfig: a report must also work for a run that another
    # version stored, whose fields this version may not know.
    stored = parse_stored_text(read_stored_text(store), store.redacted_url(STORED))
    return redact_values(stored)


def facts(store: Store) -> dict[str, str]:
    """Return {title: value} of a run, in the order of a report."""
    with interpreting(store.redacted_url(STORED)):
        configured = _configured(store, stored_config(store))
    return {**configured, **_latest_checkpoint(store)}


def _configured(store: Store, config: Mapping[str, Any]) -> dict[str, str]:
    # A config that an older version stored may lack whole sections, or have them empty.
    model = config["model"]
    task = config.get("task") or {}
    tuning = config.get("tuning") or {}
    batch = config.get("batch") or {}
    evaluation = config.get("evaluation") or {}

    base_model = str(model["path"])
    if model.get("revision"):
        base_model += f", revision {model['revision']}"

    optimizer = _describe_optimizer(config.get("optimizer") or {}, config.get("schedule") or {})
    return {
        "task": str(task.get("name", "causal_lm")).replace("_", " "),
        "base model": base_model,
        "tuning method": str(tuning.get("method", "full")),
        "training data": _describe_data(store, config["data"].get("train"), "data.train"),
        "held-out data": _describe_data(store, evaluation.get("data"), "evaluation.data"),
        "global batch": f"{batch.get('global_batch')} samples or sequences of at most "
        f"{batch.get('sequence_length')} tokens",
        "optimizer": optimizer,
        "seed": str(config["run"].get("seed", 0)),
    }


def _describe_data(store: Store, sources: Any, field: str) -> str:
    """Return the sources of a field, and their counts from the run's index if it has one."""
    if not sources:
        return "none"

    # A config may name one source or a list, each as a path or a mapping.
    path_list = []
    for source in sources if isinstance(sources, list) else [sources]:
        path = source["path"] if isinstance(source, Mapping) else source
        path_list.append(str(path))
    paths = ", ".join(path_list)

    # Counts are an extra: a damaged index, or one of another format, must not hide the other facts.
    try:
        index = indices.load(store, f"{FOLDER}/{field}")
    except DistFtError:
        index = None
    if index is None:
        return paths

    num_shards = len(index.shards)
    plural = "" if num_shards == 1 else "s"
    return (
        f"{paths}: {num_shards:,} shard{plural}, "
        f"{index.num_samples:,} samples, {index.total('num_tokens'):,} tokens"
    )


def _describe_optimizer(optimizer: Mapping[str, Any], schedule: Mapping[str, Any]) -> str:
    text = str(optimizer.get("name", "adamw"))
    rate = optimizer.get("learning_rate")
    if isinstance(rate, int | float):
        text += f", learning rate {rate:g}"

    if schedule.get("name"):
        text += f", {schedule['name']}"
    return text


def _latest_checkpoint(store: Store) -> dict[str, str]:
    """Return engine, workers and versions from the manifest of the latest readable checkpoint."""
    for name in discovery.list_committed(store):
        try:
            manifest = discovery.load_manifest(store, name)
        except DistFtError:
            continue

        engine = ENGINE_TITLES.get(manifest.engine, manifest.engine)
        num_workers = manifest.world_size
        plural = "" if num_workers == 1 else "s"
        progress = manifest.progress
        versions = [f"{library} {number}" for library, number in sorted(manifest.versions.items())]
        return {
            "trained": f"{progress.step:,} steps, {progress.num_tokens:,} tokens",
            "engine": f"{engine}, {num_workers} worker{plural}",
            "saved": manifest.created_at,
            "versions": ", ".join(versions),
        }

    return {}
