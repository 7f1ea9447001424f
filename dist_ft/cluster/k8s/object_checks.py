"""Our production checklist, part one: what can be said of one object. Pure.

Each rule names what would go wrong: an image that is another tomorrow, a pod killed in the middle of a save, a port
open to all, a secret in a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dist_ft.cluster.k8s import secret_scan
from dist_ft.cluster.k8s.load_manifests import at
from dist_ft.cluster.k8s.operator_rules import groups
from dist_ft.cluster.k8s.options import image_problem
from dist_ft.cluster.k8s.pod_security import pod_problems, security_problems
from dist_ft.cluster.k8s.pods import SAVE_SECONDS, gibibytes

Problem = tuple[str, str]


def templates(content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, pod template) of all pods an object makes: Ray's groups, and the kinds of Kubernetes' own."""
    kind = content.get("kind")
    cluster, below = cluster_of(content)
    if cluster is not None:
        for path, group in groups(cluster):
            if isinstance(at(group, "template"), dict):
                yield f"{below}.{path}.template", group["template"]
        submitter = at(content, "spec", "submitterPodTemplate")
        if isinstance(submitter, dict):
            yield "spec.submitterPodTemplate", submitter
    elif kind == "Pod":
        yield "", content
    elif kind == "CronJob" and isinstance(
        at(content, "spec", "jobTemplate", "spec", "template"), dict
    ):
        yield "spec.jobTemplate.spec.template", content["spec"]["jobTemplate"]["spec"]["template"]
    elif kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job") and at(
        content, "spec", "template"
    ):
        yield "spec.template", content["spec"]["template"]


def cluster_of(content: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return the cluster spec of a RayJob or a RayCluster and the path it lies at; (None, "") of other kinds."""
    if content.get("kind") == "RayJob" and isinstance(at(content, "spec", "rayClusterSpec"), dict):
        return content["spec"]["rayClusterSpec"], "spec.rayClusterSpec"
    if content.get("kind") == "RayCluster" and isinstance(at(content, "spec"), dict):
        return content["spec"], "spec"
    return None, ""


def problems(content: dict[str, Any], locked: bool = False) -> Iterator[Problem]:
    """Yield (path, what is wrong) of one object.

    Args:
        content: the object.
        locked: its namespace is there for locked memory (RDMA): the capability IPC_LOCK is no problem.
    """
    for path, template in templates(content):
        below = f"{path}.spec" if path else "spec"
        yield from pod_problems(template, below, locked)
        yield from _containers(template, below)
    cluster, below = cluster_of(content)
    if cluster is not None:
        yield from ((f"{below}.{path}", text) for path, text in _cluster(cluster))
    if content.get("kind") == "RayJob":
        yield from _job(content)
    yield from secret_scan.problems(content)
    yield from _open(content)


def _containers(template: dict[str, Any], below: str) -> Iterator[Problem]:
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(at(template, "spec", kind, default=[])):
            path = f"{below}.{kind}[{index}]"
            wrong = image_problem(str(at(container, "image", default="")))
            if wrong:
                yield f"{path}.image={at(container, 'image')}", wrong
            for amount, name in (("limits", "memory"), ("requests", "memory"), ("requests", "cpu")):
                if at(container, "resources", amount, name) is None:
                    yield (
                        f"{path}.resources.{amount}.{name}",
                        (
                            "not said: the node may be overbooked, and the pod "
                            "evicted in the middle of a run; give it"
                        ),
                    )


def _cluster(cluster: dict[str, Any]) -> Iterator[Problem]:
    if at(cluster, "authOptions", "mode") != "token":
        yield (
            "authOptions.mode",
            (
                "no token authentication: whoever reaches the port runs code in the cluster; set "
                "authOptions: {mode: token}"
            ),
        )
    if at(cluster, "enableInTreeAutoscaling", default=False):
        yield from security_problems(
            at(cluster, "autoscalerOptions", "securityContext", default={}),
            "autoscalerOptions.securityContext",
            {},
        )
    for path, group in groups(cluster):
        if path == "headGroupSpec":
            yield from _head(group)
        elif isinstance(at(group, "template"), dict):
            yield from (
                (f"{path}.template.{inner}", text) for inner, text in _worker(group["template"])
            )


def _head(group: dict[str, Any]) -> Iterator[Problem]:
    if at(group, "rayStartParams", "num-cpus") != "0":
        yield (
            "headGroupSpec.rayStartParams.num-cpus",
            ('not "0": workers may be placed on the head, whose loss is that of the job; set it'),
        )
    kinds = {at(group, "serviceType"), at(group, "headService", "spec", "type")} - {
        None,
        "ClusterIP",
    }
    if kinds:
        yield (
            "headGroupSpec.serviceType",
            (
                f"{', '.join(sorted(kinds))}: opens the dashboard and job ports beyond the "
                "cluster; take ClusterIP, and kubectl port-forward"
            ),
        )
    if at(group, "enableIngress", default=False):
        yield (
            "headGroupSpec.enableIngress",
            "opens the dashboard beyond the namespace; leave it out",
        )


def _worker(template: dict[str, Any]) -> Iterator[Problem]:
    """Yield what would cost a worker its last save, or its collectives their memory."""
    spec = at(template, "spec", default={})
    container = at(spec, "containers", 0, default={})
    hook = " ".join(map(str, at(container, "lifecycle", "preStop", "exec", "command", default=[])))
    grace = at(spec, "terminationGracePeriodSeconds", default=30)
    save = str(at(template, "metadata", "annotations", SAVE_SECONDS, default="0"))
    drained = re.search(r"--deadline-remaining-seconds[ =](\d+)", hook)
    if re.search(r"\bray stop\b", hook):
        yield (
            "spec.containers[0].lifecycle.preStop",
            ("ray stop ends the worker that is to save; use ray drain-node with a deadline"),
        )
    elif not drained or "drain-node" not in hook:
        yield (
            "spec.containers[0].lifecycle.preStop",
            (
                "no drain: the pod ends before the run has saved; use ray "
                "drain-node with --deadline-remaining-seconds, and wait"
            ),
        )
    elif int(drained[1]) >= grace:
        yield (
            "spec.terminationGracePeriodSeconds",
            (f"{grace} is not above the drain of {drained[1]} s, which counts in it; raise it"),
        )
    if not save.isdigit():
        yield (
            f"metadata.annotations.{SAVE_SECONDS}",
            f"{save}: not a whole number of seconds; correct it",
        )
    else:
        least = max(int(save), 1)
        for path, what, seconds in (
            ("spec.terminationGracePeriodSeconds", "grace period", grace),
            (
                "spec.containers[0].lifecycle.preStop",
                "drain",
                int(drained[1]) if drained else least,
            ),
        ):
            if seconds < least:
                yield (
                    path,
                    f"a {what} of {seconds} s, and a save takes {least} s ({SAVE_SECONDS}); raise it",
                )
    yield from _shared(spec, container)


def _shared(spec: dict[str, Any], container: dict[str, Any]) -> Iterator[Problem]:
    mounts = {
        at(mount, "mountPath"): at(mount, "name")
        for mount in at(container, "volumeMounts", default=[])
    }
    volume = next(
        (
            volume
            for volume in at(spec, "volumes", default=[])
            if at(volume, "name") == mounts.get("/dev/shm")
        ),
        None,
    )
    size = at(volume, "emptyDir", "sizeLimit")
    if at(volume, "emptyDir", "medium") != "Memory" or size is None:
        yield (
            "spec.volumes",
            (
                "no memory volume with a sizeLimit at /dev/shm: nccl and DeepSpeed get the 64 MiB a "
                "container has; mount an emptyDir with medium: Memory there"
            ),
        )
        return
    memory = at(container, "resources", "limits", "memory")
    try:
        if memory is not None and gibibytes(str(size)) >= gibibytes(str(memory)):
            yield (
                "spec.volumes",
                (
                    f"/dev/shm of {size} leaves nothing of the memory limit of {memory}, which it "
                    "counts in; raise the limit"
                ),
            )
    except ValueError:
        yield "spec.volumes", f"sizeLimit={size} or memory={memory}: not an amount; correct it"


def _job(content: dict[str, Any]) -> Iterator[Problem]:
    spec = at(content, "spec", default={})
    if at(spec, "submissionMode", default="K8sJobMode") != "HTTPMode":
        yield (
            "spec.submissionMode",
            (
                f"{at(spec, 'submissionMode', default='K8sJobMode')}: a broken log stream may "
                "fail a run that is well (kuberay#4921); take HTTPMode"
            ),
        )
    if at(spec, "backoffLimit", default=0) < 1 and at(spec, "clusterSelector") is None:
        yield (
            "spec.backoffLimit",
            (
                "none: the loss of the head ends the run for good; give at least 1, it goes on "
                "from storage"
            ),
        )
    if not at(spec, "shutdownAfterJobFinishes", default=False) and not at(spec, "deletionStrategy"):
        yield "spec.shutdownAfterJobFinishes", "off: GPUs are paid for after the end; set it"
    entry = str(at(spec, "entrypoint", default=""))
    if re.search(r"run\.name=\S*[$`]", entry):
        yield (
            "spec.entrypoint",
            "a run.name that is another at each start: nothing is resumed; give a fixed one",
        )
    if at(spec, "jobId"):
        yield (
            "spec.jobId",
            "a fixed id: the job of a new cluster is taken for the old one; leave it out",
        )


def _open(content: dict[str, Any]) -> Iterator[Problem]:
    kind = at(content, "spec", "type", default="ClusterIP")
    if content.get("kind") == "Service" and kind in ("LoadBalancer", "NodePort"):
        yield "spec.type", f"{kind}: opens ports beyond the cluster; take ClusterIP"
    if content.get("kind") == "Ingress":
        yield (
            "kind",
            "an Ingress opens a port beyond the namespace; leave it out, and use kubectl port-forward",
        )
