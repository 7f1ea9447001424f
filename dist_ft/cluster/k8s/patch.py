"""JSON patches (RFC 6902: add, replace, remove), as kustomize applies them. Pure."""

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
        kind: kind of the objects.
        ops: operations, each {op, path, value}.
        name: name of the only object to change; empty: all of the kind.
    """

    kind: str
    ops: Sequence[Json]
    name: str = ""

    def applies_to(self, document: Json) -> bool:
        """Whether this patch changes an object."""
        if document["kind"] != self.kind:
            return False
        return not self.name or document["metadata"]["name"] == self.name


@dataclass(frozen=True)
class Component:
    """A kustomize component: what it is for, and what it changes.

    Attributes:
        about: a line for readers of the file.
        patches: the patches, in order.
        namespace: where all objects move to; empty: they stay.
    """

    about: str
    patches: Sequence[Patch] = field(default=())
    namespace: str = ""


def apply_component(objects: Sequence[Json], component: Component) -> list[Json]:
    """Return `objects` with a component applied; the originals are not changed."""
    # not deepcopy, which would keep values shared between objects
    changed: list[Json] = json.loads(json.dumps(list(objects)))
    for patch in component.patches:
        for document in changed:
            if patch.applies_to(document):
                for op in patch.ops:
                    _apply_operation(document, op)

    # after the patches, as in kustomize
    if component.namespace:
        for document in changed:
            # a namespace has none, but is the one that the others move to
            if document["kind"] not in CLUSTER_SCOPED:
                document["metadata"]["namespace"] = component.namespace
            elif document["kind"] == "Namespace":
                document["metadata"]["name"] = component.namespace
    return changed


def _apply_operation(document: Json, op: Json) -> None:
    """Apply one operation in place.

    Raises:
        KeyError, IndexError: its path does not exist.
    """
    # "~1" first: the other way around, the escape "~01" of the text "~1" would become "/"
    steps = [step.replace("~1", "/").replace("~0", "~") for step in op["path"].split("/")[1:]]

    target: Any = document
    for step in steps[:-1]:
        target = target[int(step)] if isinstance(target, list) else target[step]

    key: Any = steps[-1]
    # "-" is the place after the last entry
    if isinstance(target, list):
        key = len(target) if key == "-" else int(key)

    if op["op"] in ("replace", "remove"):
        target[key]  # must exist

    if op["op"] == "remove":
        del target[key]
    elif op["op"] == "add" and isinstance(target, list):
        # a copy, as one patch may apply to several objects, which later patches change separately
        target.insert(key, copy.deepcopy(op["value"]))
    else:
        target[key] = copy.deepcopy(op["value"])
