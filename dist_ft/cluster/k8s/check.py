"""Validates manifests without a cluster and reports all problems at once.

Core kinds are checked strictly against Kubernetes' own schemas (a misspelled field is an error), as
are pods inside Ray's resources. RayJob and RayCluster are checked against their CRD, if its schema
is given, and against the operator's rules. All objects are checked against our production
checklist.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.cluster.k8s import (
    crd,
    cross_object_checks,
    load_manifests,
    object_checks,
    operator_rules,
)
from dist_ft.cluster.k8s.load_manifests import Document, Problem, lookup
from dist_ft.core.errors import ConfigError
from dist_ft.core.printable import printable_line

RAY_KINDS = ("RayJob", "RayCluster")
REQUIRED_PACKAGES = {
    "kubernetes_validate": "kubernetes-validate",
    "jsonschema": "jsonschema",
    "celpy": "cel-python",
}
"""Module names and the packages that contain them."""
MAX_MESSAGE_LENGTH = 300
MAX_NAME_LENGTH = 100
_NAMES = {
    "apiVersion": re.compile(r"([a-z0-9.-]{1,253}/)?v[a-z0-9]{1,62}"),
    "kind": re.compile(r"[A-Za-z][A-Za-z0-9]{0,62}"),
}
"""Names from which the schema of an object follows."""


@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        checked: number of objects.
        problems: one line each.
        notes: what could not be checked, one line each.
    """

    checked: int
    problems: Sequence[str]
    notes: Sequence[str]


def check(paths: Sequence[str], crds: str | None = None, version: str = "") -> CheckReport:
    """Check the manifests in files and folders.

    Args:
        paths: files, folders, and folders for kustomize.
        crds: file or folder with Ray's CRDs, or their schemas; None: the structure of Ray's
            resources is not checked.
        version: version of Kubernetes, such as 1.33; empty: the latest known version.

    Raises:
        ConfigError: the manifests cannot be read, or a required package is missing.
    """
    require_packages()
    import kubernetes_validate

    major_minor = kubernetes_validate.utils.major_minor
    known = {major_minor(one) for one in kubernetes_validate.utils.all_versions()}
    if version and major_minor(version) not in known:
        ordered = sorted(known, key=lambda text: [int(part) for part in text.split(".")])
        raise ConfigError(
            [
                f"--kubernetes={version}: unknown version. Known versions: {ordered[0]} to "
                f"{ordered[-1]}. Use one of these, or install a newer kubernetes-validate."
            ],
            "k8s check",
        )

    documents = load_manifests.read_documents(paths)
    schemas = crd.load_schemas(crds) if crds else {}

    return check_documents(documents, schemas, version or kubernetes_validate.latest_version())


def check_documents(
    documents: Sequence[Document], schemas: crd.Schemas, version: str
) -> CheckReport:
    """Check objects against the schemas of Kubernetes `version` and of CRDs, and our rules."""
    notes: list[str] = []
    lines: list[str] = []

    # other rules rely on the structure, so they are only checked where it is valid
    well_formed: list[Document] = []
    for document in documents:
        problems = list(_check_structure(document, schemas, version, notes))
        lines += [document.describe(problem) for problem in problems]
        if not problems:
            well_formed.append(document)

    has_unexpected_structure = False
    for document in well_formed:
        try:
            problems = list(_check_rules(document, documents))
        except (TypeError, AttributeError, ValueError, KeyError) as error:
            # Only an object without a known schema gets here. The rules read its fields without
            # checking their types first.
            has_unexpected_structure = True
            problems = [
                Problem(
                    "spec",
                    f"does not have the structure of a {document.kind} ({error}). Pass --crd to "
                    "see which field is wrong.",
                )
            ]
        lines += [document.describe(problem) for problem in problems]

    # One malformed object could be what another refers to: a missing policy or budget would be a
    # consequence of its problem, not a problem of its own.
    if len(well_formed) == len(documents) and not has_unexpected_structure:
        lines += cross_object_checks.check_together(documents)

    # Objects of different files may have the same problem. dict keeps the order, a set does not.
    return CheckReport(len(documents), list(dict.fromkeys(lines)), list(dict.fromkeys(notes)))


def _check_rules(document: Document, documents: Sequence[Document]) -> Iterator[Problem]:
    """Yield what the operator refuses, and what our checklist finds in the object."""
    if document.kind in RAY_KINDS:
        yield from operator_rules.check_operator_rules(document.content)

    # a rule about one object, but the object's namespace decides which capabilities are allowed
    allow_locked_memory = cross_object_checks.allows_locked_memory(document.namespace, documents)
    yield from object_checks.check_object(document.content, allow_locked_memory)


def require_packages() -> None:
    """Raise ConfigError if a package that the check needs is not installed."""
    # all are looked up before the first is imported, so that one command installs all of them
    missing = []
    for module, package in REQUIRED_PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            missing.append(package)
    if missing:
        raise ConfigError(
            [
                f"{', '.join(missing)}: not installed. The check of manifests needs it. Install "
                "the extra: pip install 'dist-ft[k8s]'"
            ],
            "k8s check",
        )


def _check_structure(
    document: Document, schemas: crd.Schemas, version: str, notes: list[str]
) -> Iterator[Problem]:
    """Yield what an API server would refuse."""
    # without kind and version there is no schema to choose, so other problems would be guesses
    content = document.content
    for field, pattern in _NAMES.items():
        name = lookup(content, field)
        if not isinstance(name, str):
            yield Problem(field, "is missing. Every object needs one. Add it.")
            return
        # The library opens a file with this name: it must not lead elsewhere.
        if not pattern.fullmatch(name):
            shown = printable_line(name)[:MAX_NAME_LENGTH]
            yield Problem(field, f"is {shown!r}, which no object of Kubernetes has. Correct it.")
            return
    if not isinstance(lookup(content, "metadata", "name"), str):
        yield Problem("metadata.name", "is missing or not a string. Every object needs one.")
        return

    if document.kind in RAY_KINDS:
        yield from _check_ray_resource(document, schemas, version, notes)
        return

    problems = _check_core_resource(content, version)
    if problems is None:
        note = f"no schema of {content['apiVersion']} is known; only our checklist was applied"
        notes.append(document.describe(Problem("kind", note)))
    else:
        yield from problems


def _check_ray_resource(
    document: Document, schemas: crd.Schemas, version: str, notes: list[str]
) -> Iterator[Problem]:
    content = document.content
    if content["apiVersion"] != "ray.io/v1":
        yield Problem(
            "apiVersion",
            f"is {content['apiVersion']}. Only ray.io/v1 is supported (KubeRay 1.1 and newer). "
            "Correct it.",
        )
        return

    schema = schemas.get(crd.schema_key(content))
    if schema is None:
        notes.append(
            f"{document.kind}: without its CRD (--crd), only the pods in it were checked against "
            "a schema"
        )
    else:
        yield from crd.check_schema(content, schema, notes)

    # The CRD does not describe the pods in a Ray resource: its templates accept any field. They
    # are checked as if they were pods of their own.
    for path, template in object_checks.pod_templates(content):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        for problem in _check_core_resource(pod, version) or ():
            yield Problem(f"{path}.{problem.path}", problem.message)


def _check_core_resource(content: dict[str, Any], version: str) -> Sequence[Problem] | None:
    """Return what is wrong with an object of Kubernetes' own; None: it has no known schema."""
    try:
        text = json.dumps(content, default=str)
    except TypeError:
        return (Problem("metadata", "or another field has a key that is no text. Quote it."),)
    return _check_core_json(text, version)


@functools.lru_cache(maxsize=1024)
def _check_core_json(text: str, version: str) -> Sequence[Problem] | None:
    """Do as `_check_core_resource` for an object as JSON.

    Cached, as the library reads all its schemas again for each object.
    """
    import kubernetes_validate

    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        message = error.message.replace("\n", " ")[:MAX_MESSAGE_LENGTH]
        return (Problem(crd.format_path(error.absolute_path), message),)
    except kubernetes_validate.SchemaNotFoundError:
        return None
    return ()
