"""Plain words about the schema: what a field allows, what is wrong with a value, which key was probably meant.

Guarantees: a line never speaks pydantic's language, never prints a credential, and always says what to do. Pure.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_ft.config import renames
from dist_ft.config.schema import RunConfig, Section
from dist_ft.core.logs import redact

# What is allowed, where the type alone does not say it well.
_ALLOWED = {
    "run.name": "lower-case letters, digits and '-', at most 47, with a letter or digit at both ends",
    "cluster.workers": "a whole number, or a range such as 1..4 or [1, 4] with both ends at least 1",
    "cluster.gpus_per_worker": "0 or 1",
    "cluster.network_interface": "names of network interfaces with commas between, such as eth0",
    "checkpoint.every_steps": "a whole number of at least 0, or auto",
    "checkpoint.local_every_steps": "a whole number of at least 1, or auto",
    "data.train": "a path, or a list of paths or of mappings with path, subset and split; at least one",
    "evaluation.data": "a path, or a list of paths or of mappings with path, subset and split",
}
_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping",
}
_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")

# Names other tools use for the same thing.
_ELSEWHERE = {
    "lr": "optimizer.learning_rate",
    "max_lr": "optimizer.learning_rate",
    "max_steps": "schedule.steps",
    "num_epochs": "schedule.epochs",
    "num_train_epochs": "schedule.epochs",
    "lr_scheduler_type": "schedule.name",
    "train_batch_size": "batch.global_batch",
    "global_batch_size": "batch.global_batch",
    "batch_size": "batch.global_batch",
    "gradient_accumulation_steps": "batch.global_batch",
    "micro_batch_size": "batch.micro_batch",
    "per_device_train_batch_size": "batch.micro_batch",
    "max_length": "batch.sequence_length",
    "max_seq_length": "batch.sequence_length",
    "sequence_len": "batch.sequence_length",
    "gradient_clipping": "optimizer.max_grad_norm",
    "gradient_checkpointing": "model.activation_checkpointing",
    "bf16": "model.dtype",
    "precision": "model.dtype",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.path",
    "attn_implementation": "model.attention",
    "output_dir": "run.storage",
    "save_steps": "checkpoint.every_steps",
    "eval_steps": "evaluation.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "logging_steps": "log.every_steps",
    "num_workers": "cluster.workers",
    "world_size": "cluster.workers",
    "packing": "data.pack",
}


def section_of(info: FieldInfo) -> type[Section] | None:
    """Return the section class a field holds, if it holds one."""
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


@cache
def schema_paths() -> dict[str, FieldInfo]:
    """Return every dotted path of the schema, sections included, in the order of the file."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, info in model.model_fields.items():
            yield prefix + name, info
            section = section_of(info)
            if section:
                yield from walk(section, f"{prefix}{name}.")

    return dict(walk(RunConfig, ""))


def is_text(path: str) -> bool:
    """Tell whether the field at `path` holds a text (or nothing)."""
    info = schema_paths().get(renames.RUN.fields.get(path, path))
    return info is not None and info.annotation in (str, str | None)


def allowed(path: str, info: FieldInfo) -> str:
    """Say in plain words what the field at `path` may be."""
    if path in _ALLOWED:
        return _ALLOWED[path]
    annotation, optional = info.annotation, ""
    if type(None) in get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
        optional = ", or null"
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation)) + optional
    words = _TYPES.get(get_origin(annotation) or annotation, "another value")  # type: ignore[arg-type]
    return words + _bounds(info) + optional


def _bounds(info: FieldInfo) -> str:
    """Say the bounds of a number: ' from 0 to 1', ' of at least 1', ' above 0'."""
    low = {
        kind: getattr(bound, kind)
        for bound in info.metadata
        for kind in ("ge", "gt")
        if hasattr(bound, kind)
    }
    high = {
        kind: getattr(bound, kind)
        for bound in info.metadata
        for kind in ("le", "lt")
        if hasattr(bound, kind)
    }
    words = (
        [f"of at least {low['ge']}"]
        if "ge" in low
        else [f"above {low['gt']}"]
        if "gt" in low
        else []
    )
    words += (
        [f"at most {high['le']}"]
        if "le" in high
        else [f"below {high['lt']}"]
        if "lt" in high
        else []
    )
    return " " + " and ".join(words) if words else ""


def shown(value: Any) -> str:
    """Return `value` short, on one line and without credentials, as it would stand in the file."""
    if isinstance(value, str) and value and value.isprintable() and not _looks_otherwise(value):
        text = value
    else:
        text = json.dumps(value, default=str, ensure_ascii=False)
    text = redact(text)
    return text if len(text) <= 80 else text[:77] + "..."


def _looks_otherwise(value: str) -> bool:
    """Tell whether a text would be read as another type if it stood bare."""
    try:
        float(value)
    except ValueError:
        return (
            value.lower() in ("true", "false", "null", "yes", "no", "on", "off", "~")
            or value != value.strip()
        )
    return True


def wrong_value(path: str, info: FieldInfo, value: Any, kind: str = "") -> str:
    """Return the line for a value the schema refuses; `kind` is pydantic's error type."""
    may = allowed(path, info)
    if kind in _RANGE_ERRORS:
        what = "out of range"
    elif kind == "string_pattern_mismatch":
        what = "not of the allowed form"
    elif kind == "too_short":
        what = "empty"
    elif may.startswith("one of "):
        what = "no such choice"
    elif path in _ALLOWED:
        what = "not of the allowed kind"
    else:
        what = f"not {may.split(' of at ')[0].split(' above ')[0].split(',')[0]}"
    return f"{path}={shown(value)}: {what}; allowed: {may}; {_remedy(info, value)}"


def _remedy(info: FieldInfo, value: Any) -> str:
    choices = [
        str(choice)
        for part in (info.annotation, *get_args(info.annotation))
        if get_origin(part) is Literal
        for choice in get_args(part)
    ]
    near = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.6)
    if near and near[0] != str(value):
        return f"did you mean {near[0]}?"
    if info.annotation in (str, str | None) and isinstance(value, int | float):
        return "put it in quotes"
    if info.is_required() or info.default_factory is not None:
        return "correct it"
    return f"correct it, or leave it out for the default ({shown(info.default)})"


def missing_field(path: str, info: FieldInfo) -> str:
    """Return the line for a required field that is not there."""
    meaning = (info.description or "").split(". ")[0].split(": ")[0].split(" (")[0].rstrip(".")
    hint = f", or pass {path}=..." if path in schema_paths() else ""
    return f"{path}: missing; needed: {allowed(path, info)} ({meaning}); add it{hint}"


def unknown_key(path: str, value: Any) -> tuple[str, str | None]:
    """Return the line for a key the schema does not have, and the path that was probably meant."""
    paths = schema_paths()
    near = nearest(path)
    parent = path.rpartition(".")[0]
    section = section_of(paths[near]) if near else not parent and isinstance(value, Mapping)
    what = "no such section" if section else "no such field"
    if path in paths:
        return (
            f"{path}: a dotted key in the file; sections nest; write it indented below {parent}:",
            path,
        )
    if near:
        return f"{path}: {what}; did you mean {near}?", near
    siblings = [name.rpartition(".")[2] for name in paths if name.rpartition(".")[0] == parent]
    return (
        f"{path}: {what}; allowed{' in ' + parent if parent else ''}: {', '.join(siblings)}; remove it",
        None,
    )


def nearest(path: str) -> str | None:
    """Return the valid path that `path` was probably meant to be: a sibling, the same key elsewhere, another name."""
    paths = schema_paths()
    parent, _, leaf = path.rpartition(".")
    siblings = [name for name in paths if name.rpartition(".")[0] == parent]
    leaves: dict[str, str] = {}
    for name in paths:
        leaves.setdefault(name.rpartition(".")[2], name)
    close = difflib.get_close_matches(
        leaf, [name.rpartition(".")[2] for name in siblings], n=1, cutoff=0.75
    )
    if close:
        return f"{parent}.{close[0]}" if parent else close[0]
    if leaf in leaves:
        return leaves[leaf]
    if leaf in _ELSEWHERE:
        return _ELSEWHERE[leaf]
    whole = difflib.get_close_matches(path, list(paths), n=1, cutoff=0.75)
    if whole:
        return whole[0]
    close = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.8)
    return leaves[close[0]] if close else None
