"""Configs that are correct: shipped ones, and ones drawn from the schema."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from dist_ft.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
TASKS = {
    "causal_lm": "model",
    "sequence_classification": "bert",
    "multi_label": "bert",
    "regression": "bert",
    "token_classification": "bert",
    "question_answering": "bert",
    "seq2seq": "bart",
    "masked_lm": "bert",
    "embedding": "bert",
}
"""Task -> folder of a small model for it."""
LOCAL = (
    "run.storage=runs",
    "data.cache_dir=cache",
    "cluster.workers=0",
    "schedule.epochs=null",
    "schedule.steps=1",
    "batch.sequence_length=32",
)
"""Overrides by which a shipped config runs on the small models and data."""
TEXTS = (
    "a",
    "text",
    "label",
    "data/causal_lm/*.jsonl",
    "model",
    "*h*",
    "prompt",
    "runs/lm",
    "s3://b/x",
)


def base_document(task: str, name: str) -> dict[str, Any]:
    """Return a correct run of one step for a task; all paths are relative to the project."""
    document: dict[str, Any] = {
        "run": {"name": name, "storage": "runs", "seed": 1},
        "model": {"path": TASKS[task], "dtype": "float32"},
        "task": {"name": task},
        "data": {
            "train": f"data/{task}/*.jsonl",
            "overlong": "truncate",
            "block_mib": 0.004,
            "cache_dir": "cache",
        },
        "batch": {"global_batch": 4, "micro_batch": 2, "sequence_length": 32},
        "schedule": {"name": "constant", "steps": 1},
        "cluster": {"workers": 0},
        "checkpoint": {"every_steps": 1},
        "evaluation": {"data": f"held-out/{task}/*.jsonl"},
        "log": {"tensorboard": False},
    }
    if task == "question_answering":
        document["task"]["stride"] = 4
    return document


def shipped_configs() -> list[Path]:
    """Return the YAML files of configs/."""
    return sorted((ROOT / "configs").rglob("*.yaml"))


@cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of a run's config."""
    return RunConfig.model_json_schema()


@cache
def field_names() -> tuple[str, ...]:
    """Return all names of sections and fields."""
    names = set(schema()["properties"])
    for definition in schema()["$defs"].values():
        names |= set(definition.get("properties", ()))
    return tuple(sorted(names))


@cache
def field_paths() -> tuple[str, ...]:
    """Return all fields as section.field."""
    paths = []
    for section, info in schema()["properties"].items():
        for field in _resolve(info).get("properties", ()):
            paths.append(f"{section}.{field}")
    return tuple(paths)


def with_random_fields(rng: random.Random, document: dict[str, Any], count: int) -> dict[str, Any]:
    """Return a copy of a document with `count` fields set to values that the schema allows.

    Together they may contradict each other: a check then says so.
    """
    document = copy.deepcopy(document)
    for _ in range(count):
        section, _, field = rng.choice(field_paths()).partition(".")
        info = _resolve(schema()["properties"][section])["properties"][field]
        if isinstance(document.setdefault(section, {}), dict):
            document[section][field] = _draw(rng, info)
    return document


def _resolve(info: dict[str, Any]) -> dict[str, Any]:
    """Return the definition that a schema refers to."""
    if "$ref" in info:
        return dict(schema()["$defs"][info["$ref"].rpartition("/")[2]])
    if "allOf" in info:
        return _resolve(info["allOf"][0])
    return info


def _draw(rng: random.Random, info: dict[str, Any], depth: int = 0) -> Any:
    """Return a value that a schema allows, if it says enough."""
    info = _resolve(info)
    if "anyOf" in info:
        return _draw(rng, rng.choice(info["anyOf"]), depth)
    if "enum" in info:
        return rng.choice(info["enum"])
    if "const" in info:
        return info["const"]

    kind = info.get("type")
    if kind == "boolean":
        return rng.random() < 0.5
    if kind in ("integer", "number"):
        return _draw_number(rng, info, kind == "integer")
    if kind == "string":
        return rng.choice(TEXTS)
    if kind == "array":
        item = info.get("items", {"type": "string"})
        return [_draw(rng, item, depth + 1) for _ in range(rng.randrange(3 if depth < 3 else 1))]
    if kind == "object":
        return dict(_draw_fields(rng, info, depth))
    return None


def _draw_fields(rng: random.Random, info: dict[str, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for name, field in info.get("properties", {}).items():
        if name in info.get("required", ()) or rng.random() < 0.2:
            yield name, _draw(rng, field, depth + 1)


def _draw_number(rng: random.Random, info: dict[str, Any], is_integer: bool) -> float | int:
    low = info.get("minimum", info.get("exclusiveMinimum", 0))
    high = info.get("maximum", info.get("exclusiveMaximum", low + rng.choice((2, 8, 100))))
    if is_integer:
        return rng.randint(int(low), max(int(low), min(int(high), int(low) + 100)))
    return rng.choice((low, high, (low + high) / 2, low + (high - low) * rng.random()))
