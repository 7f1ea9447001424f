"""Manifests validated without a cluster: everything that is wrong with them, at once.

Core kinds strictly against Kubernetes' own schemas (a misspelt field is an error), pods inside of Ray's resources too;
RayJob and RayCluster against their CRD, if its schema is given, and the operator's rules; all against our checklist.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.cluster.k8s import (
    crd,
    cross_object_checks,
    load_manifests,
    object_checks,
    operator_rules,
)
from dist_ft.cluster.k8s.load_manifests import Document, at
from dist_ft.core.errors import ConfigError

RAY = ("RayJob", "RayCluster")
NEEDS = {
    "kubernetes_validate": "kubernetes-validate",
    "jsonschema": "jsonschema",
    "celpy": "cel-python",
}


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        checked: number of objects.
        problems: a line each.
        notes: what could not be looked at, a line each.
    """

    checked: int
    problems: Sequence[str]
    notes: Sequence[str]


def check(paths: Sequence[str], crds: str | None = None, version: str = "") -> Report:
    """Check the manifests in files and folders; raises ConfigError where they, or what it needs, can not be read.

    Args:
        paths: files, folders, folders for kustomize.
        crds: file or folder with the CRDs of Ray, or their schemas; None: structure of Ray's resources is not checked.
        version: of Kubernetes (1.33); empty: the newest known.
    """
    require()
    import kubernetes_validate

    newest = kubernetes_validate.latest_version()
    known = {
        kubernetes_validate.utils.major_minor(one)
        for one in kubernetes_validate.utils.all_versions()
    }
    if version and kubernetes_validate.utils.major_minor(version) not in known:
        ordered = sorted(known, key=lambda text: [int(part) for part in text.split(".")])
        raise ConfigError(
            [
                f"--kubernetes={version}: not known here; allowed: {ordered[0]} to {ordered[-1]}; take "
                "one of these, or a newer kubernetes-validate"
            ],
            "k8s check",
        )
    return check_documents(
        load_manifests.read(paths), crd.load(crds) if crds else {}, version or newest
    )


def check_documents(found: Sequence[Document], schemas: crd.Schemas, version: str) -> Report:
    """Check objects that were read."""
    notes: list[str] = []
    lines: list[str] = []
    sound: list[Document] = []  # rules take the shape for granted
    for document in found:
        wrong = list(_shape(document, schemas, version, notes))
        lines += [document.say(path, text) for path, text in wrong]
        if not wrong:
            sound.append(document)
    for document in sound:
        try:
            lines += [document.say(path, text) for path, text in _rules(document, found)]
        except (
            TypeError,
            AttributeError,
            ValueError,
            KeyError,
        ) as error:  # only where no schema was held against it
            lines.append(
                document.say(
                    "spec",
                    f"not shaped as a {document.kind} ({error}); give --crd, which names the field",
                )
            )
    if len(sound) == len(found) and not any("not shaped as" in line for line in lines):
        lines += cross_object_checks.problems(found)
    return Report(len(found), list(dict.fromkeys(lines)), list(dict.fromkeys(notes)))


def _rules(document: Document, found: Sequence[Document]) -> list[tuple[str, str]]:
    """Return what the operator refuses, and what our checklist says of the object."""
    content = document.content
    rules = list(operator_rules.problems(content)) if document.kind in RAY else []
    return rules + list(
        object_checks.problems(content, cross_object_checks.is_locked(document.namespace, found))
    )


def require() -> None:
    """Raise ConfigError if what the check needs is not installed."""
    import importlib.util

    missing = [
        package for module, package in NEEDS.items() if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ConfigError(
            [
                f"{', '.join(missing)}: not installed, and manifests are checked with it; install the "
                "extra: pip install 'dist-ft[k8s]'"
            ],
            "k8s check",
        )


def _shape(
    document: Document, schemas: crd.Schemas, version: str, notes: list[str]
) -> Iterator[tuple[str, str]]:
    """Yield what no API server would take."""
    content = document.content
    for field in ("apiVersion", "kind"):
        if not isinstance(at(content, field), str):
            yield field, "not said; every object has one"
            return
    if not isinstance(at(content, "metadata", "name"), str):
        yield "metadata.name", "not said, or no text; every object here has one"
        return
    if document.kind in RAY:
        yield from _ray(document, schemas, version, notes)
    elif (message := _core(content, version)) is None:
        notes.append(
            document.say(
                "kind",
                f"{content['apiVersion']} has no schema here; only our checklist was held "
                "against it",
            )
        )
    else:
        yield from message


def _ray(
    document: Document, schemas: crd.Schemas, version: str, notes: list[str]
) -> Iterator[tuple[str, str]]:
    content = document.content
    if content["apiVersion"] != "ray.io/v1":
        yield (
            "apiVersion",
            f"{content['apiVersion']}: allowed: ray.io/v1 (KubeRay 1.1 and newer); correct it",
        )
        return
    schema = schemas.get(crd.version_of(content))
    if schema is None:
        notes.append(
            f"{document.kind}: no CRD was given (--crd), so of its own fields only those of pods were checked"
        )
    else:
        own: list[str] = []
        yield from crd.problems(content, schema, own)
        notes += own
    for path, template in object_checks.templates(content):
        pod: Mapping[str, Any] = {"apiVersion": "v1", "kind": "Pod", **template}
        for inner, text in _core(dict(pod), version) or ():
            yield f"{path}.{inner}", text


def _core(content: dict[str, Any], version: str) -> Sequence[tuple[str, str]] | None:
    """Return what is wrong with an object of Kubernetes' own; None: it has no schema here."""
    return _core_of(json.dumps(content, default=str), version)


@functools.lru_cache(maxsize=1024)
def _core_of(text: str, version: str) -> Sequence[tuple[str, str]] | None:
    """As `_core`, of an object as JSON; remembered, for the library reads all its schemas anew for each object."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return ((crd.dotted(error.absolute_path), error.message.replace("\n", " ")[:300]),)
    except kubernetes_validate.SchemaNotFoundError:
        return None
    return ()
