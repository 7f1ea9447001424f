"""Our production checklist, part two: what can be said only of all objects together. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dist_ft.cluster.k8s.load_manifests import Document, at
from dist_ft.cluster.k8s.object_checks import cluster_of, templates

DASHBOARD = 8265
LEVEL = "pod-security.kubernetes.io/enforce"
RDMA = ("vpc.amazonaws.com/efa", "rdma/", "nvidia.com/hostdev", "openshift.io/")


def problems(documents: Sequence[Document]) -> Iterator[str]:
    """Yield lines about objects that should fit one another."""
    policies = [document for document in documents if document.kind == "NetworkPolicy"]
    budgets = [document for document in documents if document.kind == "PodDisruptionBudget"]
    pods = [
        (document, path, at(template, "metadata", "labels", default={}))
        for document in documents
        for path, template in templates(document.content)
    ]
    for document, path, labels in pods:
        if cluster_of(document.content)[0] is None:
            continue
        if not any(
            _selects(policy, "podSelector", document, labels)
            and "Ingress" in at(policy.content, "spec", "policyTypes", default=["Ingress"])
            for policy in policies
        ):
            yield document.say(
                path,
                "no NetworkPolicy for ingress selects these pods: the whole cluster reaches their "
                "ports; add one, or give its file too",
            )
        if not any(_selects(budget, "selector", document, labels) for budget in budgets):
            yield document.say(
                path,
                "no PodDisruptionBudget selects these pods: a node upgrade may take all at "
                "once; add one, or give its file too",
            )
    for policy in policies:
        yield from _reach(policy)
    for budget in budgets:
        yield from _budget(budget, [(document, labels) for document, _, labels in pods])
    for document in documents:
        if document.kind == "Namespace":
            yield from _namespace(document, documents)
    yield from _references(documents)


def _selects(chosen: Document, field: str, document: Document, labels: dict[str, str]) -> bool:
    """Tell whether a policy or budget selects pods with these labels; an empty budget selector selects all, too."""
    selector = at(chosen.content, "spec", field, default=None)
    if selector is None or chosen.namespace != document.namespace:
        return False
    if any(
        labels.get(key) != value for key, value in at(selector, "matchLabels", default={}).items()
    ):
        return False
    return all(_holds(labels, term) for term in at(selector, "matchExpressions", default=[]))


def _holds(labels: dict[str, str], term: dict[str, Any]) -> bool:
    value, operator, values = (
        labels.get(str(term.get("key"))),
        term.get("operator"),
        at(term, "values", default=[]),
    )
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }.get(str(operator), False)


def _reach(policy: Document) -> Iterator[str]:
    """Yield rules by which more than the namespace and the operator reach the dashboard's port."""
    for index, rule in enumerate(at(policy.content, "spec", "ingress", default=[])):
        ports = [at(port, "port") for port in at(rule, "ports", default=[])]
        ends = [at(port, "endPort") for port in at(rule, "ports", default=[])]
        reached = (
            not ports
            or "dashboard" in ports
            or any(
                isinstance(port, int) and port <= DASHBOARD <= (end or port)
                for port, end in zip(ports, ends, strict=True)
            )
        )
        peers = at(rule, "from", default=[])
        wide = not peers or any(
            at(peer, "ipBlock") is not None
            or (
                at(peer, "namespaceSelector") is not None
                and not any(
                    at(peer, "podSelector", part, default={})
                    for part in ("matchLabels", "matchExpressions")
                )
            )
            for peer in peers
        )
        if reached and wide:
            yield policy.say(
                f"spec.ingress[{index}]",
                f"opens the dashboard's port {DASHBOARD} beyond the "
                "namespace; name pods (of the operator), or another port",
            )


def _budget(budget: Document, pods: Sequence[tuple[Document, dict[str, str]]]) -> Iterator[str]:
    if not any(_selects(budget, "selector", document, labels) for document, labels in pods):
        yield budget.say(
            "spec.selector", "selects no pods of these files; correct its labels or its namespace"
        )
    spec = at(budget.content, "spec", default={})
    if "maxUnavailable" in spec or isinstance(at(spec, "minAvailable"), str):
        yield budget.say(
            "spec",
            "pods of Ray have no owner with a scale: only minAvailable, a number, works; use it",
        )


def _namespace(document: Document, documents: Sequence[Document]) -> Iterator[str]:
    level = at(document.content, "metadata", "labels", LEVEL)
    if level == "restricted" or (level == "privileged" and is_locked(document.name, documents)):
        return
    yield document.say(
        f"metadata.labels.{LEVEL}",
        f"{level or 'none'}: pods may ask for more than they need; set "
        "restricted (a namespace of its own for RDMA: privileged)",
    )


def is_locked(namespace: str, documents: Sequence[Document]) -> bool:
    """Tell whether a namespace is labelled privileged, and a pod there asks for an RDMA device."""
    labelled = any(
        document.kind == "Namespace"
        and document.name == namespace
        and at(document.content, "metadata", "labels", LEVEL) == "privileged"
        for document in documents
    )
    return labelled and any(
        name.startswith(RDMA)
        for document in documents
        if document.namespace == namespace
        for _, template in templates(document.content)
        for container in at(template, "spec", "containers", default=[])
        for name in at(container, "resources", "limits", default={})
    )


def _references(documents: Sequence[Document]) -> Iterator[str]:
    """Yield names of the run's own objects that none of the files makes, where they make others of the kind."""
    made = {(document.kind, document.namespace, document.name) for document in documents}
    kinds = {kind for kind, _, _ in made}
    for document in documents:
        for path, template in templates(document.content):
            spec, space = at(template, "spec", default={}), document.namespace
            wanted = [
                ("ServiceAccount", space, at(spec, "serviceAccountName"), "serviceAccountName"),
                ("PriorityClass", "", at(spec, "priorityClassName"), "priorityClassName"),
            ]
            wanted += [
                ("ConfigMap", space, at(volume, "configMap", "name"), "volumes")
                for volume in at(spec, "volumes", default=[])
            ]
            wanted += [
                (
                    "PersistentVolumeClaim",
                    space,
                    at(volume, "persistentVolumeClaim", "claimName"),
                    "volumes",
                )
                for volume in at(spec, "volumes", default=[])
            ]
            for kind, where, name, field in wanted:
                if name and kind in kinds and (kind, where, name) not in made:
                    yield document.say(
                        f"{path}.spec.{field}",
                        f"{name}: none of these files makes such a {kind}; correct the name",
                    )
