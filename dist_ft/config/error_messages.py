"""Messages about the schema: allowed values, wrong values, and misspelled keys.

Guarantees: a message does not quote pydantic, never contains a credential, and always says what to
do. Pure.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_ft.config import renames
from dist_ft.config.schema import RunConfig, Section
from dist_ft.core.logs import redact
from dist_ft.core.secret_names import is_plain_name

# For these fields the type says too little: a pattern, a union, or a list of paths or mappings.
_ALLOWED = {
    "run.name": (
        "lower-case letters, digits and '-', at most 47, with a letter or digit at both ends"
    ),
    "cluster.workers": (
        "a whole number, or a range such as 1..4 or [1, 4] with both ends at least 1"
    ),
    "cluster.gpus_per_worker": "0 or 1",
    "cluster.network_interface": "names of network interfaces, separated by commas, such as eth0",
    "checkpoint.every_steps": "a whole number of at least 0, or auto",
    "checkpoint.local_every_steps": "a whole number of at least 1, or auto",
    "data.train": (
        "a path, or a list of paths or of mappings with path, subset and split; at least one"
    ),
    "log.notify.command": "a list of words, such as [./notify.sh, me]",
    "log.notify.events": "a list of end, give_up, restarts and no_progress",
    "evaluation.data": "a path, or a list of paths or of mappings with path, subset and split",
}
"""Allowed values of fields whose type is not clear enough."""
_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping",
}
OPTION_FIELDS = (
    "storage.options",
    "zero.deepspeed",
    "cluster.network_variables",
    "cluster.labels",
    "cluster.resources_per_worker",
)
"""Fields that hold options of libraries and names of clusters, with any keys."""
MAX_LENGTH = 80
"""Characters of a value in a message."""

# Error types of pydantic. They are part of its documented interface; its texts are not.
_RANGE_ERRORS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")

# transformers, DeepSpeed, axolotl, TRL: too unlike ours to be found by similarity.
_NAMES_OF_OTHER_TOOLS = {
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


def section_of(info: FieldInfo | None) -> type[Section] | None:
    """Return the class of the section that a field holds; None if it holds none, or is none."""
    annotation = info.annotation if info else None
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


# The schema never changes in a process, and every misspelled key looks all paths up.
@cache
def schema_paths() -> dict[str, FieldInfo]:
    """Return all dotted paths of the schema, sections included, in the order of the file."""

    def walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, info in model.model_fields.items():
            yield prefix + name, info
            section = section_of(info)
            if section:
                yield from walk(section, f"{prefix}{name}.")

    return dict(walk(RunConfig, ""))


def is_text(path: str) -> bool:
    """Whether the field at `path` is a text (or null)."""
    # An old name counts as its new one, so that its value gets no problem of its own.
    info = schema_paths().get(renames.RUN.fields.get(path, path))
    return info is not None and info.annotation in (str, str | None)


def allowed(path: str, info: FieldInfo) -> str:
    """Return in words the allowed values of the field at `path`."""
    if path in _ALLOWED:
        return _ALLOWED[path]

    # `int | None` is reported as int, with null as another choice.
    annotation: Any = info.annotation
    optional = ""
    if type(None) in get_args(annotation):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
        optional = ", or null"

    if get_origin(annotation) is Literal:
        choices = ", ".join(str(choice) for choice in get_args(annotation))
        if path == "task.name":
            choices += ", or the import path of a class such as mypackage.tasks:MyTask"
        return f"one of {choices}{optional}"

    if get_origin(annotation) is tuple:
        return f"a list of {_plural(get_args(annotation)[0])}{optional}"

    # The origin of dict[str, float] is dict; a plain type has none.
    words = _TYPES.get(get_origin(annotation) or annotation, "another value")
    return words + _bounds(info) + optional


def _plural(annotation: Any) -> str:
    """Return in words what a list holds."""
    # A type with bounds, such as a number above 0, is Annotated[type, bounds].
    plain = getattr(annotation, "__origin__", annotation)
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(plain, "mappings")


def _bounds(info: FieldInfo) -> str:
    """Return the bounds of a number in words: ' of at least 1', ' above 0 and below 1', or ''."""
    bounds: dict[str, Any] = {}
    for bound in info.metadata:
        for kind in ("ge", "gt", "le", "lt"):
            if hasattr(bound, kind):
                bounds[kind] = getattr(bound, kind)

    # At most one lower and one upper bound: no field has both ge and gt.
    words = []
    if "ge" in bounds:
        words.append(f"of at least {bounds['ge']}")
    elif "gt" in bounds:
        words.append(f"above {bounds['gt']}")
    if "le" in bounds:
        words.append(f"at most {bounds['le']}")
    elif "lt" in bounds:
        words.append(f"below {bounds['lt']}")

    if not words:
        return ""
    return " " + " and ".join(words)


def format_value(value: Any) -> str:
    """Return `value` as in the file, but short, on one line and without credentials."""
    if isinstance(value, str) and value and value.isprintable() and not _needs_quotes(value):
        text = value
    else:
        text = json.dumps(value, default=str, ensure_ascii=False)

    # Redact before the cut, which could leave a part of a credential that is not recognized.
    text = redact(text)
    if len(text) <= MAX_LENGTH:
        return text
    return text[: MAX_LENGTH - 3] + "..."


def field_and_value(path: str, value: Any) -> str:
    """Return `path=value` as the start of a line; the path alone where the value may be secret.

    What stands in the place of a section or of options of libraries was meant as something else:
    `storage.options=secret=...`.
    """
    is_number = isinstance(value, int | float)
    if is_number or not (path in OPTION_FIELDS or section_of(schema_paths().get(path))):
        return f"{path}={format_value(value)}"
    return path


def _needs_quotes(value: str) -> bool:
    """Whether YAML would read a bare text as another type."""
    try:
        float(value)
    except ValueError:
        pass
    else:
        return True

    # The words of YAML 1.1; and spaces at an end, which nobody would see without quotes.
    is_word = value.lower() in ("true", "false", "null", "yes", "no", "on", "off", "~")
    return is_word or value != value.strip()


def wrong_value(path: str, info: FieldInfo, value: Any, kind: str = "") -> str:
    """Return the line for a value that the schema refuses; `kind` is pydantic's error type."""
    may_be = allowed(path, info)
    if kind in _RANGE_ERRORS:
        what = "out of range"
    elif kind == "string_pattern_mismatch":
        what = "not of the allowed form"
    elif kind == "too_short":
        what = "empty"
    elif may_be.startswith("one of "):
        what = "not a valid choice"
    elif path in _ALLOWED:
        what = "not a valid value"
    else:
        # "a number of at least 0, or null" without bounds and null: "not a number".
        kind_of_value = may_be.split(" of at ")[0].split(" above ")[0].split(",")[0]
        what = f"not {kind_of_value}"

    return f"{field_and_value(path, value)}: {what}. Allowed: {may_be}. {_remedy(info, value)}"


def _remedy(info: FieldInfo, value: Any) -> str:
    """Return what to do about a wrong value."""
    choices: list[str] = []
    for part in (info.annotation, *get_args(info.annotation)):
        if get_origin(part) is Literal:
            choices += [str(choice) for choice in get_args(part)]

    # A valid choice may be refused too (a text for a number): "Did you mean 3?" would not help.
    similar = difflib.get_close_matches(str(value).lower(), choices, n=1, cutoff=0.6)
    if similar and similar[0] != str(value):
        return f"Did you mean {similar[0]}?"

    if info.annotation in (str, str | None) and isinstance(value, int | float):
        return "Put it in quotes."
    if info.is_required() or info.default_factory is not None:
        return "Correct it."
    return f"Correct it, or remove it for the default ({format_value(info.default)})."


def missing_field(path: str, info: FieldInfo) -> str:
    """Return the line for a required field that is missing."""
    # The first clause of the description says what the field is; details would not fit in a line.
    meaning = (info.description or "").split(". ")[0].split(": ")[0].split(" (")[0].rstrip(".")

    # An override cannot reach a field of a source in a list.
    hint = f", or pass {path}=<value>" if path in schema_paths() else ""
    return f"{path}: missing. Needed: {allowed(path, info)} ({meaning}). Add it{hint}."


class UnknownKey(NamedTuple):
    """The line for a key that the schema does not have, and the path that was probably meant."""

    line: str
    meant: str | None


def unknown_key(path: str, value: Any) -> UnknownKey:
    """Return what to say about a key with this `value`, and the path that was probably meant."""
    paths = schema_paths()
    near = nearest(path)
    parent = path.rpartition(".")[0]

    # Without a guess, a mapping at the top level must have been meant as a section.
    if near:
        is_section = section_of(paths[near]) is not None
    else:
        is_section = not parent and isinstance(value, Mapping)
    what = "no such section" if is_section else "no such field"

    # `schedule.steps: 3` at the top level of a file is one key with a dot in it.
    if path in paths:
        return UnknownKey(
            f"{path}: a dotted key in the file. Sections nest. Write it indented below {parent}:",
            path,
        )
    if near:
        return UnknownKey(f"{path}: {what}. Did you mean {near}?", near)

    # Not like any field: it may be no name at all, such as a key that ends with a "=".
    if not is_plain_name(path):
        path = f"{parent}.<key>" if is_plain_name(parent) else "<key>"

    siblings = [name.rpartition(".")[2] for name in paths if name.rpartition(".")[0] == parent]
    where = f" in {parent}" if parent else ""
    return UnknownKey(
        f"{path}: {what}. Allowed{where}: {', '.join(siblings)}. Remove it.",
        None,
    )


def nearest(path: str) -> str | None:
    """Return the valid path that was probably meant by `path`; None if there is none.

    Tries similar keys of the section, the same key in others, names of other tools, similar paths.
    """
    paths = schema_paths()
    parent, _, leaf = path.rpartition(".")

    # Several sections have fields of one name (seed, every_steps): the first in the schema counts.
    leaves: dict[str, str] = {}
    sibling_leaves = []
    for name in paths:
        section, _, name_leaf = name.rpartition(".")
        leaves.setdefault(name_leaf, name)
        if section == parent:
            sibling_leaves.append(name_leaf)

    # A typo within the right section is the most likely mistake.
    close = difflib.get_close_matches(leaf, sibling_leaves, n=1, cutoff=0.75)
    if close:
        return f"{parent}.{close[0]}" if parent else close[0]

    if leaf in leaves:
        return leaves[leaf]
    if leaf in _NAMES_OF_OTHER_TOOLS:
        return _NAMES_OF_OTHER_TOOLS[leaf]

    # Within a known section all paths share a prefix, which makes unrelated keys look similar.
    if parent not in paths:
        whole = difflib.get_close_matches(path, list(paths), n=1, cutoff=0.75)
        if whole:
            return whole[0]

    # Stricter than above: over all sections, an unrelated name is more often similar by chance.
    close = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.8)
    return leaves[close[0]] if close else None
