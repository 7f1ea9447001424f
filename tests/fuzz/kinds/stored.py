"""Stored bytes that functions parse: manifests, indexes, cache blocks, ledgers, fragments.

The functions are called without a command, so that thousands of mutations take seconds.
"""

from __future__ import annotations

import random

from fuzz import mutate
from fuzz.inputs import Input
from fuzz.kinds import files, runs
from fuzz.kinds.kind import Kind
from fuzz.materials import Materials

BATCH = 25
"""Mutations of one case."""


def generate(rng: random.Random, materials: Materials, number: int) -> Input:
    """Return mutations of one stored file for the function that reads it."""
    materials.path("runs/lm")
    name = rng.choice([*materials.files("runs/lm"), *materials.files("cache")])
    content = materials.read(name)
    while not _reader(name) or len(content) > 200_000:
        name = rng.choice([*materials.files("runs/lm"), *materials.files("cache")])
        content = materials.read(name)

    call = _reader(name)
    mutations = {
        f"mutated/{call}-{number}": _mutated(rng, call, content) for number in range(BATCH)
    }
    return Input(call=call, files=mutations)


def _reader(name: str) -> str:
    """Return the function of `fuzz.calls` that reads a file; "": none."""
    if name.endswith("manifest.json"):
        return "read_manifests"
    if name.endswith(".zst"):
        return "read_ledgers"
    if name.startswith("cache/"):
        return "read_blocks"
    if name.endswith("data.train.json"):
        return "read_indexes"
    if name.endswith("metrics.jsonl"):
        return "read_metrics"
    if "/checkpoints/" in name and name.endswith(".safetensors"):
        return "read_fragments"
    return ""


def _mutated(rng: random.Random, call: str, content: bytes) -> bytes:
    if rng.random() < 0.5:
        if call == "read_manifests":
            return runs.resealed_manifest(rng, content)
        if call == "read_indexes":
            return runs.resealed_index(rng, content)
    changed = files.mutated(rng, content)
    return changed if isinstance(changed, bytes) else mutate.mutate_bytes(rng, content)


KIND = Kind("stored", generate, ("model", "data", "held-out", "runs/lm"), quick_cases=20)
