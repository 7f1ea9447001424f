"""Our production checklist, part two: rules about several objects together. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from dist_ft.cluster.k8s.load_manifests import Document, Problem, lookup
from dist_ft.cluster.k8s.object_checks import pod_templates, ray_cluster

DASHBOARD_PORT = 8265
SECURITY_LEVEL_LABEL = "pod-security.kubernetes.io/enforce"
RDMA_DEVICES = ("vpc.amazonaws.com/efa", "rdma/", "nvidia.com/hostdev", "openshift.io/")
"""Prefixes of the resource names of RDMA devices."""


class _Pods(NamedTuple):
    """The pods of one template.

    Attributes:
        document: the object that creates them.
        path: path of the template in the object.
        labels: labels of the pods.
    """

    document: Document
    path: str
    labels: dict[str, str]


def check_together(documents: Sequence[Document]) -> Iterator[str]:
    """Yield a line for each problem of objects that should fit together."""
    policies = [document for document in documents if document.kind == "NetworkPolicy"]
    budgets = [document for document in documents if document.kind == "PodDisruptionBudget"]

    all_pods = []
    for document in documents:
        for path, template in pod_templates(document.content):
            labels = lookup(template, "metadata", "labels", default={})
            all_pods.append(_Pods(document, path, labels))

    for pods in all_pods:
        if ray_cluster(pods.document.content) is not None:
            yield from _check_coverage(pods, policies, budgets)

    # One kind of rule after the other: the report lists problems in the order that they are found.
    for policy in policies:
        yield from _check_dashboard_access(policy)
    for budget in budgets:
        yield from _check_budget(budget, all_pods)

    for document in documents:
        if document.kind == "Namespace":
            yield from _check_namespace(document, documents)

    yield from _check_references(documents)


def _check_coverage(
    pods: _Pods, policies: Sequence[Document], budgets: Sequence[Document]
) -> Iterator[str]:
    """Yield whether a network policy or a disruption budget is missing for pods of Ray."""
    # a policy without policyTypes applies to ingress
    has_policy = False
    for policy in policies:
        if _selects(policy, "podSelector", pods):
            types = lookup(policy.content, "spec", "policyTypes", default=["Ingress"])
            if "Ingress" in types:
                has_policy = True
                break
    if not has_policy:
        yield pods.document.describe(
            Problem(
                pods.path,
                "no NetworkPolicy for ingress selects these pods, so the whole cluster can reach "
                "their ports. Add one, or pass its file too.",
            )
        )

    if not any(_selects(budget, "selector", pods) for budget in budgets):
        yield pods.document.describe(
            Problem(
                pods.path,
                "no PodDisruptionBudget selects these pods, so a node upgrade may evict all at "
                "once. Add one, or pass its file too.",
            )
        )


def _selects(selecting: Document, field: str, pods: _Pods) -> bool:
    """Whether a policy or budget selects pods; an empty selector selects all."""
    selector = lookup(selecting.content, "spec", field, default=None)
    # no selector at all selects nothing, unlike an empty one
    if selector is None or selecting.namespace != pods.document.namespace:
        return False

    required = lookup(selector, "matchLabels", default={})
    if any(pods.labels.get(key) != value for key, value in required.items()):
        return False

    expressions = lookup(selector, "matchExpressions", default=[])
    return all(_matches(pods.labels, expression) for expression in expressions)


def _matches(labels: dict[str, str], expression: dict[str, Any]) -> bool:
    value = labels.get(str(expression.get("key")))
    values = lookup(expression, "values", default=[])

    # As in Kubernetes: NotIn also matches pods that do not have the label.
    results = {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }

    # an unknown operator matches nothing, so that a missing policy is reported
    return results.get(str(expression.get("operator")), False)


def _check_dashboard_access(policy: Document) -> Iterator[str]:
    """Yield rules that let more than the namespace and the operator reach the dashboard's port."""
    for index, rule in enumerate(lookup(policy.content, "spec", "ingress", default=[])):
        if _includes_dashboard_port(rule) and _admits_other_namespaces(rule):
            yield policy.describe(
                Problem(
                    f"spec.ingress[{index}]",
                    f"opens the dashboard's port {DASHBOARD_PORT} beyond the namespace. Restrict "
                    "it to pods (of the operator), or to another port.",
                )
            )


def _includes_dashboard_port(rule: dict[str, Any]) -> bool:
    entries = lookup(rule, "ports", default=[])
    if not entries:
        return True  # all ports
    for entry in entries:
        port = lookup(entry, "port")
        # a port may be the name that the pods give it
        if port == "dashboard":
            return True

        if isinstance(port, int) and port <= DASHBOARD_PORT <= (lookup(entry, "endPort") or port):
            return True
    return False


def _admits_other_namespaces(rule: dict[str, Any]) -> bool:
    """Whether a rule admits addresses, or all pods of other namespaces."""
    peers = lookup(rule, "from", default=[])
    if not peers:
        return True  # everyone
    for peer in peers:
        if lookup(peer, "ipBlock") is not None:
            return True

        # A namespaceSelector alone admits every pod of these namespaces.
        names_pods = any(
            lookup(peer, "podSelector", field, default={})
            for field in ("matchLabels", "matchExpressions")
        )

        if lookup(peer, "namespaceSelector") is not None and not names_pods:
            return True
    return False


def _check_budget(budget: Document, all_pods: Sequence[_Pods]) -> Iterator[str]:
    if not any(_selects(budget, "selector", pods) for pods in all_pods):
        yield budget.describe(
            Problem(
                "spec.selector",
                "selects no pods of these files. Correct its labels or its namespace.",
            )
        )

    spec = lookup(budget.content, "spec", default={})
    # Kubernetes computes maxUnavailable and percentages from the scale of the pods' owner.
    if "maxUnavailable" in spec or isinstance(lookup(spec, "minAvailable"), str):
        yield budget.describe(
            Problem(
                "spec",
                "pods of Ray have no owner with a scale, so only minAvailable as a number works. "
                "Use that.",
            )
        )


def _check_namespace(document: Document, documents: Sequence[Document]) -> Iterator[str]:
    level = lookup(document.content, "metadata", "labels", SECURITY_LEVEL_LABEL)
    if level == "restricted":
        return
    if level == "privileged" and allows_locked_memory(document.name, documents):
        return
    yield document.describe(
        Problem(
            f"metadata.labels.{SECURITY_LEVEL_LABEL}",
            f"is {level or 'missing'}, so pods may request more rights than they need. Set it to "
            "restricted (in a separate namespace for RDMA: privileged).",
        )
    )


def allows_locked_memory(namespace: str, documents: Sequence[Document]) -> bool:
    """Whether a namespace is labeled privileged and a pod in it requests an RDMA device."""
    # Both must be true: a privileged namespace without devices would only lower the standard.
    is_privileged = any(
        document.kind == "Namespace"
        and document.name == namespace
        and lookup(document.content, "metadata", "labels", SECURITY_LEVEL_LABEL) == "privileged"
        for document in documents
    )
    if not is_privileged:
        return False

    own = [document for document in documents if document.namespace == namespace]
    for document in own:
        for _, template in pod_templates(document.content):
            for container in lookup(template, "spec", "containers", default=[]):
                limits = lookup(container, "resources", "limits", default={})
                if any(name.startswith(RDMA_DEVICES) for name in limits):
                    return True
    return False


class _Reference(NamedTuple):
    """An object that a pod template refers to.

    Attributes:
        kind: kind of the object.
        namespace: namespace of the object; empty for a cluster-scoped one.
        name: name of the object; None: the template does not refer to one.
        field: field of the pod's spec that contains the name.
    """

    kind: str
    namespace: str
    name: str | None
    field: str


def _check_references(documents: Sequence[Document]) -> Iterator[str]:
    """Yield references to objects that no file contains, for kinds that some file contains."""
    known = {(document.kind, document.namespace, document.name) for document in documents}

    # An object of a kind that no file contains may exist in the cluster already.
    kinds = {kind for kind, _, _ in known}
    for document in documents:
        for path, template in pod_templates(document.content):
            for reference in _references(template, document.namespace):
                identity = (reference.kind, reference.namespace, reference.name)
                if reference.name and reference.kind in kinds and identity not in known:
                    yield document.describe(
                        Problem(
                            f"{path}.spec.{reference.field}",
                            f"refers to the {reference.kind} {reference.name}, which none of "
                            "these files contains. Correct the name.",
                        )
                    )


def _references(template: dict[str, Any], namespace: str) -> Iterator[_Reference]:
    spec = lookup(template, "spec", default={})
    account = lookup(spec, "serviceAccountName")
    yield _Reference("ServiceAccount", namespace, account, "serviceAccountName")

    priority = lookup(spec, "priorityClassName")
    yield _Reference("PriorityClass", "", priority, "priorityClassName")

    volumes = lookup(spec, "volumes", default=[])
    for volume in volumes:
        config_map = lookup(volume, "configMap", "name")
        yield _Reference("ConfigMap", namespace, config_map, "volumes")
    for volume in volumes:
        claim = lookup(volume, "persistentVolumeClaim", "claimName")
        yield _Reference("PersistentVolumeClaim", namespace, claim, "volumes")
