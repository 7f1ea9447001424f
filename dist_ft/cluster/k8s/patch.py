"""JSON patches (RFC 6902: add, replace, remove), as kustomize takes them. Pure."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
CLUSTER_SCOPED = frozenset({"Namespace", "PriorityClass"})


@dataclass(frozen=True)
class Patch:
    """Operations on the objects of a kind.

    Attributes:
        kind: of the objects.
        ops: operations, each {op, path, value}.
        name: of the one object meant; empty: all of the kind.
    """

    kind: str
    ops: Sequence[Json]
    name: str = ""


@dataclass(frozen=True)
class Part:
    """A kustomize component: what it is for, and what it changes.

    Attributes:
        about: a line for the reader of the file.
        patches: in their order.
        namespace: where all objects move to; empty: nowhere.
    """

    about: str
    patches: Sequence[Patch] = field(default=())
    namespace: str = ""


def applied(objects: Sequence[Json], part: Part) -> list[Json]:
    """Return `objects` with `part` applied; they themselves stay as they are."""
    changed = json.loads(
        json.dumps(list(objects))
    )  # not deepcopy, which keeps what two objects share
    for patch in part.patches:
        for document in changed:
            if document["kind"] == patch.kind and patch.name in ("", document["metadata"]["name"]):
                for op in patch.ops:
                    _operate(document, op)
    if part.namespace:
        for document in changed:
            if document["kind"] not in CLUSTER_SCOPED:
                document["metadata"]["namespace"] = part.namespace
            elif document["kind"] == "Namespace":
                document["metadata"]["name"] = part.namespace
    return changed


def _operate(document: Json, op: Json) -> None:
    """Carry one operation out; raises KeyError or IndexError where its path leads nowhere."""
    *way, last = [step.replace("~1", "/").replace("~0", "~") for step in op["path"].split("/")[1:]]
    target: Any = document
    for step in way:
        target = target[int(step)] if isinstance(target, list) else target[step]
    key: Any = last if not isinstance(target, list) else len(target) if last == "-" else int(last)
    if op["op"] in ("replace", "remove"):
        target[key]
    if op["op"] == "remove":
        del target[key]
    elif op["op"] == "add" and isinstance(target, list):
        target.insert(key, copy.deepcopy(op["value"]))
    else:
        target[key] = copy.deepcopy(op["value"])
